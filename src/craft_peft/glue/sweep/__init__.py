"""Many runs from one file: methods x tasks x seeds x learning rates.

- `experiment`: the file, read and checked; `schema`: its errors
- `plan`: its runs in their order, with everything decided; `counts`: parameters, kept between calls; `estimate`: time
- `store`: what is finished, failed or published; `runner`: what runs next; `table`: what the user sees
- `executors`: one process a run on this machine; `on_ray`: the same on a Ray cluster; `commands`: both start a process
  of `job`, the run itself; `forked`: the same without its imports
"""
