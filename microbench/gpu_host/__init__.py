"""Stock vLLM on an offline GPU host: packed on a CPU machine, run in stages there.

`pack` makes the bundle, `run` unpacks and uses it, `keep` files what came back. The
package needs nothing but the standard library until the bundle is unpacked.
"""
