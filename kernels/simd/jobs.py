"""Job: a kernel's arguments behind one pointer, read as attributes; and what the threads' loop needs (jit.py)."""

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic

from . import emit
from .kinds import I64, LLVM, JobType, PointerType
from .target import CHECKED


@infer_getattr
class _JobAttributes(AttributeTemplate):
    key = JobType

    def generic_resolve(self, job, name):
        return job.fields[name][1] if name in job.fields else None


@lower_getattr_generic(JobType)
def _job_attribute(cx, b, job, value, name):
    slot, kind = job.fields[name]
    if kind is types.none:
        return cx.get_dummy_value()

    def read(i, as_type):
        x = b.load(b.bitcast(b.gep(value, [emit.count(i)]), as_type.as_pointer()))
        x.set_metadata("invariant.load", b.module.add_metadata([]))  # else every store might change a size
        return x

    if isinstance(kind, JobType):
        return b.gep(value, [emit.count(slot)])
    if not isinstance(kind, PointerType):
        return read(slot, cx.get_value_type(kind))
    plain = LLVM[kind.stored].as_pointer()
    if not CHECKED:
        return read(slot, plain)
    checked = ir.Constant(cx.get_value_type(kind), ir.Undefined)
    for i, part in enumerate((plain, plain, plain, I64.as_pointer())):
        checked = b.insert_value(checked, read(slot + i, part), i)
    return checked


POINTER_SLOTS = 4 if CHECKED else 1


@intrinsic
def given(context, marker, value):
    """The value, or None where the marker is None: decided when compiling, so that no optional value is ever made."""
    kind = types.none if marker is types.none else value
    return kind(marker, value), lambda cx, b, sig, args: args[1] if kind is value else emit.unit(cx)


@intrinsic
def either(context, first, second):
    """The first, or the second where the first is None: decided when compiling."""
    kind = second if first is types.none else first
    return kind(first, second), lambda cx, b, sig, args: args[1] if first is types.none else args[0]


@intrinsic
def unless(context, marker, value):
    """The value, or None where the marker is not None."""
    kind = value if marker is types.none else types.none
    return kind(marker, value), lambda cx, b, sig, args: args[1] if kind is value else emit.unit(cx)


@intrinsic
def draw(context, job, slot):
    """job[slot] as it was, and add 1 to it: atomic, and the only thing that threads share."""

    def build(cx, b, sig, args):
        data = cx.make_array(job)(cx, b, args[0]).data
        return b.atomic_rmw("add", b.gep(data, [args[1]]), emit.count(1), "monotonic")

    return types.int64(job, types.intp), build


@intrinsic
def call(context, function, job, header, slot, task):
    """Call the C function at this address with the job behind its header."""

    def build(cx, b, sig, args):
        function, job_value, header, slot, task = args
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64])
        data = cx.make_array(job)(cx, b, job_value).data
        b.call(b.inttoptr(function, kind.as_pointer()), [b.gep(data, [header]), slot, task])
        return emit.unit(cx)

    n = types.int64
    return types.void(n, job, types.intp, n, n), build
