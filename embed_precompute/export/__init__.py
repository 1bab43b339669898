"""A finished dataset in the form that another program reads.

Guarantees: what is exported is read from the dataset's committed files and checked against their
checksums; nothing is said to be done before every written tensor was read back and compared.
Costs: importing this package imports nothing; a format brings what it needs.
"""
