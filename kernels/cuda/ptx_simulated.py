"""What `ptx.py` names, for Numba's simulator: each warp's lanes meet, the last to come does the work for all."""

import sys
import threading

import numpy as np
from numba.cuda.simulator.kernelapi import FakeCUDAShared

WARP = 32
_lock = threading.Lock()


def _shared_array(self, shape, dtype, alignment=None):
    """`cuda.shared.array` of the simulator, which refuses to be told of alignment: one array for each line."""
    caller = sys._getframe(1)
    place = caller.f_code.co_filename, caller.f_lineno
    with _lock:
        if place not in self._allocations:
            self._allocations[place] = np.empty(shape, str(dtype))
        return self._allocations[place]


FakeCUDAShared.array = _shared_array


class _Meeting:
    """Where the lanes of one warp exchange what they hold. All of them must come."""

    def __init__(self):
        self.barrier = threading.Barrier(WARP, self.work)
        self.given, self.made, self.task = [None] * WARP, None, None

    def work(self):
        self.made = self.task(self.given)


_meetings: dict = {}


def _together(value, task):
    """This lane's part of task([each lane's value]), a sequence of 32."""
    thread = threading.current_thread()
    lane, warp = thread.threadIdx.x % WARP, thread.threadIdx.x // WARP
    with _lock:
        meetings = _meetings.get(thread._manager)
        if meetings is None:  # a new block: those before it are done
            _meetings.clear()
            meetings = _meetings[thread._manager] = {}
        meeting = meetings.get(warp)
        if meeting is None:
            meeting = meetings[warp] = _Meeting()
    meeting.given[lane], meeting.task = value, task
    meeting.barrier.wait()
    made = meeting.made[lane]
    meeting.barrier.wait()
    return made


# --- 16 bits -------------------------------------------------------------------------------------------------------
def _from_bfloat16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def _to_bfloat16(x):
    bits = np.asarray(x, np.float32).reshape(1).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return int(np.where(np.isnan(x), 0x7FFF, rounded)[0])


def _from_float16(bits):
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def _to_float16(x):
    with np.errstate(over="ignore"):
        return int(np.asarray(x, np.float32).reshape(1).astype(np.float16).view(np.uint16)[0])


def _word(low, high):
    """Two times 16 bits as a signed word."""
    both = low | high << 16
    return both - (1 << 32) if both >> 31 else both


def widen_bfloat16(bits):
    return _from_bfloat16([bits])[0]


def widen_float16(bits):
    return _from_float16([bits])[0]


def pair_bfloat16(low, high):
    return _word(_to_bfloat16(low), _to_bfloat16(high))


def pair_float16(low, high):
    return _word(_to_float16(low), _to_float16(high))


def word(pointer, index):
    return _word(int(pointer[index]), int(pointer[index + 1]))


def put_word(pointer, index, value):
    pointer[index], pointer[index + 1] = value & 0xFFFF, value >> 16 & 0xFFFF


# --- tensor cores --------------------------------------------------------------------------------------------------
def _halves(words):
    """(lanes, registers) of words to (lanes, registers, 2) of 16 bits"""
    words = np.asarray(words, np.int64)
    return np.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).astype(np.uint16)


def _multiply_add(from_bits):
    def task(given):
        a = from_bits(_halves([g[0] for g in given])).reshape(8, 4, 2, 2, 2)  # row, pair, high column, high row, half
        b = from_bits(_halves([g[1] for g in given])).reshape(8, 4, 2, 2)  # column, pair, high row, half
        c = np.asarray([g[2] for g in given], np.float32).reshape(8, 4, 2, 2)  # row, pair, high row, half
        left = a.transpose(3, 0, 2, 1, 4).reshape(16, 16)
        right = b.transpose(2, 1, 3, 0).reshape(16, 8)
        with np.errstate(all="ignore"):
            out = (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)
            out = c + out.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3)
        return [tuple(x) for x in out.reshape(WARP, 4)]

    def multiply_add(a, b, c):
        return _together((a, b, c), task)

    return multiply_add


multiply_add_bfloat16, multiply_add_float16 = _multiply_add(_from_bfloat16), _multiply_add(_from_float16)


# --- shared memory -------------------------------------------------------------------------------------------------
class _Address:
    """A place in a shared array, moved by bytes."""

    def __init__(self, array, index):
        self.array, self.index = array, index

    def __add__(self, moved):
        return _Address(self.array, self.index + int(moved) // self.array.itemsize)


def address(array, index):
    return _Address(array, int(index))


def _read_rows(given):
    rows = [g.array[g.index : g.index + 16 // g.array.itemsize].view(np.uint16) for g in given]
    return np.stack(rows).reshape(4, 8, 8).astype(np.int64)


def _spread(matrices):
    """(4, 8, 4, 2): matrix, row, pair, half to each lane's four words"""
    words = (matrices[..., 0] | matrices[..., 1] << 16).astype(np.uint32).view(np.int32)
    return [tuple(int(w) for w in words[:, lane // 4, lane % 4]) for lane in range(WARP)]


def fragments(address):
    return _together(address, lambda given: _spread(_read_rows(given).reshape(4, 8, 4, 2)))


def fragments_transposed(address):
    return _together(address, lambda given: _spread(_read_rows(given).transpose(0, 2, 1).reshape(4, 8, 4, 2)))


def read(address):
    n = 16 // address.array.itemsize
    return tuple(int(w) for w in address.array[address.index : address.index + n].view(np.int32))


def copy(address, pointer, index, wanted):
    n = 16 // address.array.itemsize
    address.array[address.index : address.index + n] = pointer[index : index + n] if wanted else 0


def commit():
    """Copies are done at once."""


wait_for_all = wait_for_all_but_one = commit


# --- numbers -------------------------------------------------------------------------------------------------------
def exp2(x):
    with np.errstate(all="ignore"):
        return np.exp2(np.float32(x))


def larger(x, y):
    return np.fmax(np.float32(x), np.float32(y))


# --- rows of memory ------------------------------------------------------------------------------------------------
def _itself(x):
    return x


_WIDEN = {"float32": _itself, "float16": _from_float16, "bfloat16": _from_bfloat16}
_NARROW = {"float32": _itself, "float16": _to_float16, "bfloat16": _to_bfloat16}


def _four(element):
    def four(pointer, index, there):
        assert not there or (pointer.ctypes.data // pointer.itemsize + int(index)) % 4 == 0, "not aligned"
        if not there:
            return (np.float32(0),) * 4
        assert index >= 0
        return tuple(_WIDEN[element](pointer[index : index + 4]))

    return four


def _one(element):
    def one(pointer, index, there):
        if not there:
            return np.float32(0)
        assert index >= 0
        return _WIDEN[element](pointer[index : index + 1])[0]

    return one


def _put_four(element):
    def put_four(pointer, index, x):
        assert index >= 0
        assert (pointer.ctypes.data // pointer.itemsize + int(index)) % 4 == 0, "not aligned"
        for i in range(4):
            pointer[index + i] = _NARROW[element](x[i])

    return put_four


four, one, put_four = ({element: make(element) for element in _WIDEN} for make in (_four, _one, _put_four))
narrow = {element: _NARROW[element] for element in ("float16", "bfloat16")}


def number(pointer, index, there):
    assert not there or index >= 0
    return pointer[index] if there else np.int32(0)


def shared_four(array, index):
    assert index % 4 == 0
    return tuple(array[index : index + 4])


def put_shared_four(array, index, x):
    assert index % 4 == 0
    array[index : index + 4] = x


# --- between lanes -------------------------------------------------------------------------------------------------
def of_lane(x, lane):
    return _together((x, lane), lambda given: [given[g[1]][0] for g in given])


def across(x, distance):
    return _together((x, distance), lambda given: [given[lane ^ given[lane][1]][0] for lane in range(WARP)])


def warp_waits():
    _together(None, lambda given: given)


__all__ = [
    "across",
    "address",
    "commit",
    "copy",
    "exp2",
    "four",
    "fragments",
    "fragments_transposed",
    "larger",
    "multiply_add_bfloat16",
    "multiply_add_float16",
    "narrow",
    "number",
    "of_lane",
    "one",
    "pair_bfloat16",
    "pair_float16",
    "put_four",
    "put_shared_four",
    "put_word",
    "read",
    "shared_four",
    "wait_for_all",
    "wait_for_all_but_one",
    "warp_waits",
    "widen_bfloat16",
    "widen_float16",
    "word",
]
