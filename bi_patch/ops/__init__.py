"""Operations in canonical orders, and the certificates that show which kernels keep them.

An order fixes how an operation reduces. A GEMM's order is: ascending K, one pass, one fp32 accumulator per output. Any
kernel that keeps the order may serve any number of rows. A certificate is the recorded evidence that a kernel keeps the
order for every number of rows that it will serve. A linear's route says which kernel serves which numbers of rows.
"""
