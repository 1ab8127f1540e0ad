"""From the arrays of calls to jobs for the kernels: one file for each file of kernels that needs a plan.

There are two kinds of plan. Some go from shapes and strides to a job that is kept for all calls like it, and look at no
element: `dense`, `functional`, `projection`; whoever asks for one gives it its arrays, and runs it. Files `cuda_...`
are of this kind: they say what kernels of a GPU are compiled for and how many blocks there are. Others take arrays,
make room for what comes of them and run their jobs: `gate`, `gelu` and `halves` by shapes alone as well, `grouping`,
`loops` and `csr` by the edges of a graph, which they look at, and by what the job before has found. `layouts`,
`schedule`, `dropout`, `team` and `memory` are what plans have in common.

Either kind cuts work into tasks by the sizes of one head or one row, or by the edges of a graph, so that a result has
the same bits on any number of threads and in any company of other heads and batches. A plan is loaded at the first
call, since it loads the kernels.

Of the package around it a plan imports only what both floors stand on, and what imports no check itself: `arrays`,
`halves`, `errors`, and `dense_call`, in which the checks hand over a call.
"""
