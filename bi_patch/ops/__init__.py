"""Canonical orders, the routes that keep them, and the certificates that show it.

An order fixes how an operation reduces: for GEMM ascending K, one pass, one fp32 accumulator an output. Any kernel that
keeps it may serve any number of rows. A route is such a kernel for one problem on one device; a certificate is the
recorded evidence that it keeps the order for every number of rows that it will be given.
"""
