"""From the shapes of calls to jobs for the kernels: one file for each file of kernels that needs a plan.

A plan never looks at an element. It cuts work into tasks by the sizes of one head or one row, so that a result has the
same bits on any number of threads and in any company of other heads and batches. It is loaded at the first call, since
it loads the kernels. Jobs that depend on what others found, or are made of several, are run here too: those of
`grouping`, `loops`, `csr` and `halves`.

Of the package around it a plan imports only what both floors stand on, and what imports no check itself: `arrays`,
`halves`, `errors`, and `dense_call`, in which the checks hand over a call.
"""
