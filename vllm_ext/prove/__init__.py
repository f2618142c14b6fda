"""Proofs without a GPU: instruments for code that is written for one.

``syncs``    what makes the host wait for the device, with file and line
``graphs``   what a CUDA graph would bake in, and what its replay would read
``races``    loads and stores outside a kernel's tensors, and between its programs
``kernels``  registers, spills, shared memory and load widths of compiled kernels
``compiles`` what is compiled while decoding, after warm-up
``lag``      whether the tokens stay the same however late the device is
``gpu``      the same on a GPU, or what the result files of one say

Each says in its own docstring what it cannot see. None changes what it observes.
"""
