"""Sensitive data on shared machines: what the profiles ``open``, ``sensitive`` and ``restricted`` enforce
(docs/sensitive-data.md).

==============  ====================================================================================================
``profile``     puts a recipe's profile into force, once, before anything is read or written
``permissions`` who else can read a path: mode bits, ACLs, parents, targets of links
``redact``      messages, logs and tracebacks without values
``egress``      no connections but to the job's own nodes, with a self-test
``vault``       encrypted files: AES-256-GCM in pieces under a key that age recipients can unwrap; decrypted in memory
``rows``        digests of the training rows, to answer whether a text was among them
==============  ====================================================================================================
"""
