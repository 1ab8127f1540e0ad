"""From the shapes of calls to jobs for the kernels: one file for each file of kernels that needs a plan.

A plan never looks at an element. It cuts work into tasks by the sizes of one head or one row, so that a result has the
same bits on any number of threads and in any company of other heads and batches. It is loaded at the first call, since
it loads the kernels. (`grouping` is the exception: each of its jobs depends on what the last one found, and it runs
them.)
"""
