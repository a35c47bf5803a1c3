"""Launch anywhere: request + site + plan → a typed submission → files → checks → submit, watch, stop. Never imports
torch.

The pipeline, one module a step::

    request.py      what a user may ask; hygiene of every text that enters a script
    shaping.py      the shape of the job (shape.py): nodes, tasks, cores, memory, time, placement, each with its origin
    planned.py      the planner's settings for that shape
    build.py        the whole submission, once: context.py (names of the templates), container.py, environment.py,
                    files.py
    checks/         named rules that refuse a request before anything is submitted
    runs.py         the run folder
    backends/       one class and module a scheduler: what it can do, directives, submit, query, cancel
    follow.py       status; attempts.py judges each attempt, stopping.py asks runs to stop, logs.py finds their logs
    explain.py      why each line is there, and which fact it rests on
    programs/       what runs inside the job: book-keeping and pre-flight (standard library; the pre-flight needs torch)
"""
