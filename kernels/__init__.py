"""What computes: arrays and numbers only, all checked one floor up, and results where the caller wants them.

To learn attention from it, read in this order; a backward pass comes after its forward pass, or is the next file.

    functional        the steps one by one, in full matrices: s = q k, p = softmax(s), o = p v, and back
    softmax, scoring  exp2, the softmax of a stream of scores; softcap, bias, slopes, masks and dropout with derivatives
    tiles             the one loop of every product (what is below it, simd/ explains in its first lines)
    blocks            a block of queries: which keys it sees, and where its scratch lies
    dense, dense_backward, decode, pairs        attention: many queries, gradients, few queries, weights on demand
    gather, walk, csr, joint, csr_backward      the same on graphs: products with rows anywhere, batches of edges
    largest, edge_softmax                       aggregation "max" on graphs; the softmax over the edges of each node
    edge_features, gate, gelu                   rows of edges that are products; what layers do behind attention
    projection, grouping, loops                 linear layers; edges in the order of one of their ends; self-loops
    halves, packed                              float16 and bfloat16, and bfloat16 two by two
    jit, jobs, cache, simd/                     compiling and threads, jobs packed, code on disk, all that knows LLVM
    cuda/                                       for a GPU: files of the same names are twins, the others are its own;
                                                blocks, tiles, softmax, dense, dense_backward, walk, gather, csr

Some words are the house's own. A *job* is what a kernel is told, a NamedTuple; a *task* is the part of it that one call
does; a *slot* is whose scratch it may use, and *carve* says where in it what lies. `inline`, `apart` and `within` are
ways of being part of a kernel (jit.py). Terms that a call does not have are None in dense kernels, and their code is
gone: `given`, `either` and `unless` choose by that while compiling. Kernels of graphs have flags instead, `has_...`:
without a term's code they were as fast, within the noise, and each set of terms would be compiled anew.
"""
