"""The acceptance of a machine: checks in order of value, each in a process of its own with a time limit.

    checks      which checks there are, what each shows, how long it may take
    running     starts them one after the other and judges how each ended; imports no torch
    child       one check, in its own process; report: what a check writes down
    machine     what this machine is, as torch and the system tell; facts: against a site's profile
    page        ``acceptance.html``
    small       tiny models, batches and runs that the checks share

    processes   programs of this package as processes of their own; ranks: several of them; faulty: one with a fault

The others are checks, a file for each kind. A check is a function of a :class:`report.Report`.
"""
