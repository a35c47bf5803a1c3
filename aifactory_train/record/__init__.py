"""The record of a run: ``record.json``, computed from the hash-chained ``events.jsonl``; what is rendered from it; and
its check.

======================  =============================================================================================
``recorder.Recorder``   what the loop tells, written down as it happens
``recorder.load_record``  the record of a run
``check.verify``        does it still say what was written, and are the files still those it speaks of
``pack.write_pack``     report, documents, signed manifest
======================  =============================================================================================

Nothing is imported here: login-node commands stay light.
"""
