"""Machine code kept on disk, one immutable file for each compiled function, named by the hash of all it depends on.

Numba's own cache runs stale code when another file changes, can make `import` fail where nothing is writable, and loses
entries when two processes write its index. Here there is no index, and whatever is wrong with a file means compiling
again. Folders that cannot be written are read all the same: what was compiled when an image was built serves its users.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
import sys
import tempfile

import llvmlite
import numba
from numba import config
from numba.core import caching, compiler
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

_ROOT = pathlib.Path(__file__).resolve().parent
_SETTINGS = ("OPT", "SLP_VECTORIZE", "LOOP_VECTORIZE", "BOUNDSCHECK")


def _stamp() -> bytes:
    """What the machine code depends on beside signature and CPU: every kernel source, the compilers, their settings."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    settings = [str(getattr(config, name)) for name in _SETTINGS]
    made_by = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, settings)
    digest.update(repr(made_by).encode())
    return digest.digest()


# Of the sources as this process imports them: they may be replaced while it runs, long before a kernel is compiled.
_IMPORTED = _stamp()


@functools.cache
def _folders() -> tuple[tuple[pathlib.Path, ...], pathlib.Path | None]:
    """Where to read, and where to write: the first that can be written of NUMBA_CACHE_DIR, the user's cache, and beside
    the sources; those before it can still be read. (Files beside the sources outlive `pip uninstall`, and what is left
    of the folder is then imported as an empty package.)"""
    if os.environ.get("RUVECTOR_NUMBA_CACHE") == "0":
        return (), None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = (pathlib.Path(config.CACHE_DIR) / "ruvector_numba",) if config.CACHE_DIR else ()
    folders = (*own, pathlib.Path(home) / "ruvector_numba", _ROOT / "__pycache__")
    for i, folder in enumerate(folders):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folders[: i + 1], folder
    return folders, None


def cache_folder() -> pathlib.Path | None:
    """Where compiled kernels are kept, or None where nothing can be written."""
    return _folders()[1]


class PackageCache(caching._Cache):
    """What Numba asks for the machine code of one function."""

    def __init__(self, function):
        self._function = function

    cache_path = property(lambda self: str(cache_folder()))

    def _name(self, signature) -> str:
        f, codegen = self._function, cpu_target.target_context.codegen()
        key = (f.__module__, f.__qualname__, f.__code__.co_firstlineno, str(signature), codegen.magic_tuple())
        return f"{f.__name__}-{hashlib.sha256(_IMPORTED + repr(key).encode()).hexdigest()[:32]}.bin"

    def holds(self, signature) -> bool:
        """Is there a file? It may still turn out to be rubbish."""
        name = self._name(signature)
        return any((folder / name).is_file() for folder in _folders()[0])

    def load_overload(self, sig, target_context):
        # Symbols that any code may need. Numba refreshes its whole context here: 0.4 s, as that imports SciPy.
        rtsys.initialize(target_context)
        name = self._name(sig)
        for folder in _folders()[0]:
            with contextlib.suppress(Exception):  # missing, cut short, of another version: the next, or compile
                digest, payload = (folder / name).read_bytes().split(b"\n", 1)
                # code with a few wrong bytes would kill the process
                if digest == hashlib.sha256(payload).hexdigest().encode():
                    return compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))
        return None

    def save_overload(self, sig, data):
        folder = cache_folder()
        if folder is None or _stamp() != _IMPORTED:  # a part may have been imported before the change, another after it
            return
        payload = dumps(data._reduce())
        with contextlib.suppress(OSError):
            handle, unfinished = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
                os.chmod(unfinished, 0o644)  # mkstemp lets nobody else read it
                os.replace(unfinished, folder / self._name(sig))
            except OSError:
                os.unlink(unfinished)

    def enable(self):
        pass

    def disable(self):
        pass

    def flush(self):
        pass
