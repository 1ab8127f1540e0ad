"""The instructions of the GPU that Numba has no name for. The only file here that knows PTX and LLVM.

`ptx_simulated.py` has the same names for Numba's simulator. `address` is a place in shared memory; matrices of
fragments are spread over the 32 lanes of a warp as the instruction set says (PTX ISA, "Matrix fragments for
mma.m16n8k16"):

    c[0], c[1]   row lane // 4,      columns 2 * (lane % 4) and the next
    c[2], c[3]   row lane // 4 + 8,  the same columns
"""

from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

from .jit import device

_FLOAT, _INT, _LONG, _VOID = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.VoidType()
_EVERYONE = 0xFFFFFFFF


def _call(builder, result, arguments, code, constraints, effect=False):
    kinds = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(ir.InlineAsm(kinds, code, constraints, side_effect=effect), arguments)


def _unpacked(builder, value, n):
    return [builder.extract_value(value, i) for i in range(n)]


def _packed(builder, struct, element, n):
    """A tuple of Numba's from what an instruction with several results gives."""
    out = ir.Constant(ir.ArrayType(element, n), ir.Undefined)
    for i in range(n):
        out = builder.insert_value(out, builder.extract_value(struct, i), i)
    return out


# --- tensor cores --------------------------------------------------------------------------------------------------
def _multiply_add(kind):
    @intrinsic
    def multiply_add(typingctx, a, b, c):
        """c + a b of 16 x 16, 16 x 8 and 16 x 8 numbers; a and b of 16 bits, two in each word, c of float32."""
        four = types.UniTuple(types.float32, 4)
        signature = four(types.UniTuple(types.int32, 4), types.UniTuple(types.int32, 2), four)

        def generate(context, builder, signature, args):
            given = [*_unpacked(builder, args[0], 4), *_unpacked(builder, args[1], 2), *_unpacked(builder, args[2], 4)]
            code = (
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
            )
            result = ir.LiteralStructType([_FLOAT] * 4)
            made = _call(builder, result, given, code, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f")
            return _packed(builder, made, _FLOAT, 4)

        return signature, generate

    return multiply_add


multiply_add_bfloat16, multiply_add_float16 = _multiply_add("bf16"), _multiply_add("f16")


# --- shared memory -------------------------------------------------------------------------------------------------
@intrinsic
def address(typingctx, array, index):
    """Where array[index] lies in shared memory, in bytes; adding to it moves it by bytes."""
    signature = types.int32(array, types.int32)

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        there = builder.ptrtoint(builder.gep(data, [args[1]]), _LONG)
        code = "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }"
        return _call(builder, _INT, [there], code, "=r,l")

    return signature, generate


def _fragments(transposed):
    @intrinsic
    def fragments(typingctx, address):
        """Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i // 8."""
        signature = types.UniTuple(types.int32, 4)(types.int32)

        def generate(context, builder, signature, args):
            form = ".trans" if transposed else ""
            code = f"ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            result = ir.LiteralStructType([_INT] * 4)
            made = _call(builder, result, args, code, "=r,=r,=r,=r,r,~{memory}", effect=True)
            return _packed(builder, made, _INT, 4)

        return signature, generate

    return fragments


fragments, fragments_transposed = _fragments(False), _fragments(True)


@intrinsic
def read(typingctx, address):
    """The four words at a multiple of 16 bytes."""

    def generate(context, builder, signature, args):
        result = ir.LiteralStructType([_INT] * 4)
        code = "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];"
        return _packed(builder, _call(builder, result, args, code, "=r,=r,=r,=r,r,~{memory}", effect=True), _INT, 4)

    return types.UniTuple(types.int32, 4)(types.int32), generate


@intrinsic
def copy(typingctx, address, pointer, index, wanted):
    """Begin to copy 16 bytes from pointer[index] to shared memory; zeros where nothing is wanted."""
    signature = types.void(types.int32, pointer, types.int64, types.boolean)

    def generate(context, builder, signature, args):
        there = builder.ptrtoint(builder.gep(args[1], [args[2]]), _LONG)
        bytes_wanted = builder.select(
            builder.icmp_unsigned("!=", args[3], args[3].type(0)), ir.Constant(_INT, 16), ir.Constant(_INT, 0)
        )
        code = "{ .reg .u64 t; cvta.to.global.u64 t, $1; cp.async.cg.shared.global [$0], [t], 16, $2; }"
        _call(builder, _VOID, [args[0], there, bytes_wanted], code, "r,l,r,~{memory}", effect=True)
        return context.get_dummy_value()

    return signature, generate


def _statement(code):
    @intrinsic
    def statement(typingctx):
        def generate(context, builder, signature, args):
            _call(builder, _VOID, [], code, "~{memory}", effect=True)
            return context.get_dummy_value()

        return types.void(), generate

    return statement


commit = _statement("cp.async.commit_group;")  # what was begun so far is one group
wait_for_all = _statement("cp.async.wait_group 0;")  # this thread's groups have arrived
wait_for_all_but_one = _statement("cp.async.wait_group 1;")  # the newest may still be under way


# --- numbers -------------------------------------------------------------------------------------------------------
@intrinsic
def exp2(typingctx, x):
    """2**x, to 2 units in the last place"""

    def generate(context, builder, signature, args):
        return _call(builder, _FLOAT, args, "ex2.approx.ftz.f32 $0, $1;", "=f,f")

    return types.float32(types.float32), generate


@intrinsic
def larger(typingctx, x, y):
    """The larger; the other where one is NaN."""

    def generate(context, builder, signature, args):
        return _call(builder, _FLOAT, args, "max.f32 $0, $1, $2;", "=f,f,f")

    return types.float32(types.float32, types.float32), generate


def _pair(code):
    @intrinsic
    def pair(typingctx, low, high):
        """Two float32 rounded to 16 bits, in one word."""

        def generate(context, builder, signature, args):
            return _call(builder, _INT, args, code, "=r,f,f")

        return types.int32(types.float32, types.float32), generate

    return pair


pair_bfloat16, pair_float16 = _pair("cvt.rn.bf16x2.f32 $0, $2, $1;"), _pair("cvt.rn.f16x2.f32 $0, $2, $1;")


def _widen(code):
    @intrinsic
    def widen(typingctx, bits):
        """The float32 that 16 bits stand for."""

        def generate(context, builder, signature, args):
            return _call(builder, _FLOAT, args, code, "=f,h")

        return types.float32(types.uint16), generate

    return widen


widen_bfloat16 = _widen("{ .reg .b16 z; mov.b16 z, 0; mov.b32 $0, {z, $1}; }")
widen_float16 = _widen("cvt.f32.f16 $0, $1;")


@intrinsic
def word(typingctx, pointer, index):
    """Two neighbours of 16 bits as one word; the index is even."""
    signature = types.int32(pointer, types.int64)

    def generate(context, builder, signature, args):
        there = builder.bitcast(builder.gep(args[0], [args[1]]), _INT.as_pointer())
        return builder.load(there, align=4)

    return signature, generate


@intrinsic
def put_word(typingctx, pointer, index, value):
    """pointer[index], pointer[index + 1] = the word's halves; the index is even"""
    signature = types.void(pointer, types.int64, types.int32)

    def generate(context, builder, signature, args):
        there = builder.bitcast(builder.gep(args[0], [args[1]]), _INT.as_pointer())
        builder.store(args[2], there, align=4)
        return context.get_dummy_value()

    return signature, generate


# --- rows of memory that nobody writes meanwhile -------------------------------------------------------------------
# Four neighbours of each element in one load, as float32; where they are not wanted the load is skipped and they are 0.
_FOUR = {
    "float32": (
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p ld.global.nc.v4.f32 {$0,$1,$2,$3}, [t];"
    ),
    "float16": (
        ".reg .b32 a, b; .reg .b16 c, d, e, f; mov.b32 a, 0; mov.b32 b, 0; @p ld.global.nc.v2.b32 {a, b}, [t]; "
        "mov.b32 {c, d}, a; mov.b32 {e, f}, b; "
        "cvt.f32.f16 $0, c; cvt.f32.f16 $1, d; cvt.f32.f16 $2, e; cvt.f32.f16 $3, f;"
    ),
    "bfloat16": (
        ".reg .b32 a, b; mov.b32 a, 0; mov.b32 b, 0; @p ld.global.nc.v2.b32 {a, b}, [t]; "
        "shl.b32 $0, a, 16; and.b32 $1, a, 0xffff0000; shl.b32 $2, b, 16; and.b32 $3, b, 0xffff0000;"
    ),
}
_ONE = {
    "float32": "mov.b32 $0, 0; @p ld.global.nc.f32 $0, [t];",
    "float16": ".reg .b16 a; mov.b16 a, 0; @p ld.global.nc.b16 a, [t]; cvt.f32.f16 $0, a;",
    "bfloat16": ".reg .b16 a, z; mov.b16 a, 0; mov.b16 z, 0; @p ld.global.nc.b16 a, [t]; mov.b32 $0, {z, a};",
}


def _wanted(n, result, code):
    """Load n numbers from pointer[index] if `there`."""
    kind = {_FLOAT: types.float32, _INT: types.int32}[result]
    letter = "f" if result is _FLOAT else "r"

    @intrinsic
    def load(typingctx, pointer, index, there):
        made_type = kind if n == 1 else types.UniTuple(kind, n)
        signature = made_type(pointer, types.int64, types.boolean)

        def generate(context, builder, signature, args):
            where = builder.ptrtoint(builder.gep(args[0], [args[1]]), _LONG)
            wanted = builder.zext(builder.icmp_unsigned("!=", args[2], args[2].type(0)), _INT)
            text = f"{{ .reg .pred p; .reg .u64 t; cvta.to.global.u64 t, ${n}; setp.ne.u32 p, ${n + 1}, 0; {code} }}"
            kinds = ",".join([f"=&{letter}"] * n + ["l", "r"])
            if n == 1:
                return _call(builder, result, [where, wanted], text, kinds)
            made = _call(builder, ir.LiteralStructType([result] * n), [where, wanted], text, kinds)
            return _packed(builder, made, result, n)

        return signature, generate

    return load


four = {element: _wanted(4, _FLOAT, code) for element, code in _FOUR.items()}
one = {element: _wanted(1, _FLOAT, code) for element, code in _ONE.items()}
number = _wanted(1, _INT, "mov.b32 $0, 0; @p ld.global.nc.b32 $0, [t];")


def _put_four(element):
    @intrinsic
    def put_four(typingctx, pointer, index, x):
        """pointer[index : index + 4] = x, rounded to the element; the place is one of four whole elements"""
        signature = types.void(pointer, types.int64, types.UniTuple(types.float32, 4))

        def generate(context, builder, signature, args):
            where = builder.ptrtoint(builder.gep(args[0], [args[1]]), _LONG)
            code = "st.global.v4.f32 [t], {$1,$2,$3,$4};"
            if element != "float32":
                kind = {"float16": "f16x2", "bfloat16": "bf16x2"}[element]
                code = (
                    f".reg .b32 a, b; cvt.rn.{kind}.f32 a, $2, $1; cvt.rn.{kind}.f32 b, $4, $3; "
                    "st.global.v2.b32 [t], {a, b};"
                )
            text = f"{{ .reg .u64 t; cvta.to.global.u64 t, $0; {code} }}"
            given = [where, *_unpacked(builder, args[2], 4)]
            _call(builder, _VOID, given, text, "l,f,f,f,f,~{memory}", effect=True)
            return context.get_dummy_value()

        return signature, generate

    return put_four


put_four = {element: _put_four(element) for element in _FOUR}


def _narrow(code):
    @intrinsic
    def narrow(typingctx, x):
        """A float32 rounded to 16 bits."""

        def generate(context, builder, signature, args):
            return _call(builder, ir.IntType(16), args, code, "=h,f")

        return types.uint16(types.float32), generate

    return narrow


narrow = {"float16": _narrow("cvt.rn.f16.f32 $0, $1;"), "bfloat16": _narrow("cvt.rn.bf16.f32 $0, $1;")}


@intrinsic
def shared_four(typingctx, array, index):
    """array[index : index + 4] of float32 in shared memory; the index is a multiple of 4"""
    four = types.UniTuple(types.float32, 4)
    signature = four(array, types.int32)

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        shared = ir.PointerType(ir.VectorType(_FLOAT, 4), 3)
        there = builder.load(builder.addrspacecast(builder.gep(data, [args[1]]), shared), align=16)
        made = ir.Constant(ir.ArrayType(_FLOAT, 4), ir.Undefined)
        for i in range(4):
            made = builder.insert_value(made, builder.extract_element(there, _INT(i)), i)
        return made

    return signature, generate


@intrinsic
def put_shared_four(typingctx, array, index, x):
    """array[index : index + 4] = x, of float32 in shared memory; the index is a multiple of 4"""
    signature = types.void(array, types.int32, types.UniTuple(types.float32, 4))

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        shared = ir.PointerType(ir.VectorType(_FLOAT, 4), 3)
        value = ir.Constant(ir.VectorType(_FLOAT, 4), ir.Undefined)
        for i, part in enumerate(_unpacked(builder, args[2], 4)):
            value = builder.insert_element(value, part, _INT(i))
        builder.store(value, builder.addrspacecast(builder.gep(data, [args[1]]), shared), align=16)
        return context.get_dummy_value()

    return signature, generate


# --- between lanes -------------------------------------------------------------------------------------------------
@device
def of_lane(x, lane):
    """x of another lane of the warp"""
    return cuda.shfl_sync(_EVERYONE, x, lane)


@device
def across(x, distance):
    """x of the lane whose number differs in the bits of `distance`"""
    return cuda.shfl_xor_sync(_EVERYONE, x, distance)


@device
def warp_waits():
    """What a lane wrote to shared memory before, the others see after."""
    cuda.syncwarp(_EVERYONE)


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
