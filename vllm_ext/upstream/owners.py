"""Who is asked to review which part of vLLM, of what our patches may touch.

A wheel does not hold ``.github/CODEOWNERS``, so the lines are on record here. As there,
the last line that matches a path counts.
"""

AS_OF = "`.github/CODEOWNERS` at 01e1e6c (September 2026)"
LINES = (
    "vllm/compilation @zou3519 @youkaichao @ProExpertProg @BoyuanFeng",
    "vllm/config @WoosukKwon @youkaichao @robertgshaw2-redhat @mgoin @tlrmchlsmth"
    " @houseroad @yewentao256 @ProExpertProg",
    "vllm/v1/attention @LucasWilkinson @MatthewBonanni",
    "vllm/v1/attention/backend.py @WoosukKwon @zhuohan123 @youkaichao @alexm-redhat"
    " @njhill",
    "vllm/v1/attention/backends/flashinfer.py @mgoin @pavanimajety @vadiklyutiy",
    "vllm/v1/attention/backends/triton_attn.py @tdoublep",
    "vllm/v1/core @WoosukKwon @robertgshaw2-redhat @njhill @ywang96 @alexm-redhat"
    " @heheda12345 @ApostaC @orozery @ivanium",
    "vllm/v1/sample @22quinn @houseroad @njhill",
    "vllm/v1/spec_decode @benchislett @luccafong @MatthewBonanni",
    "vllm/v1/structured_output @mgoin @aarnphm @benchislett",
    "vllm/v1/engine @njhill",
    "vllm/v1/executor @njhill",
    "vllm/v1/worker @njhill",
    "vllm/v1/worker/gpu @WoosukKwon @njhill @yewentao256",
    "tests/kernels @mgoin @tlrmchlsmth @WoosukKwon @yewentao256 @zyongye"
    " @AndreasKaratzas",
    "tests/v1/core @WoosukKwon @robertgshaw2-redhat @njhill @ywang96 @alexm-redhat"
    " @heheda12345 @ApostaC @orozery @ivanium",
    "tests/v1/structured_output @mgoin @aarnphm",
    "tests/v1/determinism @yewentao256",
)


def owners(path: str) -> str:
    """Who is on record for a path, or that nobody is."""
    found = "nobody on record: look it up"
    for line in LINES:
        prefix, _, names = line.partition(" ")
        if path == prefix or path.startswith(f"{prefix}/"):
            found = names
    return found
