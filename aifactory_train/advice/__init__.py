"""What a project asks before and after its jobs, from the facts alone: where to run, how to get access, what was used.
Torch-free.

    sizing   the fewest nodes of each system that do a recipe's job, and what they cost there
    routes   routes of access that are open to an applicant
    where    all sites, ranked for one job (``aifactory where``)
    annex    the technical part of an application (``aifactory access``); answers_*: what fills a form's questions
    campaign which jobs measure scaling under a cap, and what they measured (``aifactory scale``)
    usage    what a project used, from sacct or run records (``aifactory usage``)
"""
