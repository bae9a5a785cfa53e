from tests.mutants import Mutant

_MODULE = "kernelhub.backends.reference.fused_mul_add"

MUTANTS = (
    Mutant("bias-subtracted", _MODULE, "+ bias.float()", "- bias.float()"),
    Mutant("scale-dropped", _MODULE, "x.float() * scale", "x.float()"),
    Mutant(
        "arithmetic-in-input-dtype", _MODULE, "x.float() * scale + bias.float()", "x * scale + bias"
    ),
    Mutant("bias-dropped", _MODULE, " + bias.float()", " + 0 * bias.float()"),
    Mutant("out-not-written", _MODULE, "else out.copy_(y)", "else out"),
    Mutant("scale-rounded", _MODULE, "else scale\n", "else round(scale, 1)\n"),
)
