"""Launch anywhere: request + site + plan → a typed submission → files → checks → submit, watch, stop. Never imports torch.

The pipeline, one module a step::

    request.py      what a user may ask; hygiene of every text that enters a script
    shape.py        nodes, tasks, cores, memory, time, placement, each with its origin
    build.py        the whole submission: script, programs of node and rank, data files
    checks/         named rules that refuse a request before anything is submitted
    runs.py         the run folder
    backends/       one module a scheduler: directives, submit, query, cancel
    follow.py       status, logs, stop
    explain.py      why each line is there, and which fact it rests on
    twin.py         the controller configuration of a site's twin
    programs/       what runs inside the job: book-keeping and pre-flight (standard library; the pre-flight needs torch)
"""
