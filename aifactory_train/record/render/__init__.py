"""Documents of the evidence pack. Each is a pure function of the record; none reads anything else or makes anything
up.
"""
