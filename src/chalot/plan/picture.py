"""A plan as a picture: bits of each tensor by layer, and the entropies of EWQ's blocks."""

from chalot.charts import strips
from chalot.planfile import PlanDocument
from chalot.quant.packing import stored_bytes
from chalot.quant.scheme import SCHEMES

NAMES = ("query", "key", "value", "output", "gate", "up", "down")
SAMPLE = (1024, 4096)  # a shape whose bits a weight stand for a scheme's


def bits(scheme: str) -> float:
    """Bits a weight of a scheme, on a large matrix."""
    return stored_bytes(SCHEMES[scheme], *SAMPLE) * 8 / (SAMPLE[0] * SAMPLE[1])


def picture(plan: PlanDocument) -> str:
    """SVG: a strip for each kind of tensor, a cell for each layer."""
    layers = {int(n.split(".")[1]) for n in plan.tensors if n.startswith("layers.")}
    rows: dict[str, list[float]] = {}
    for name in NAMES:
        found = [plan.tensors.get(f"layers.{i}.{name}") for i in sorted(layers)]
        if any(found):
            rows[name] = [bits(s) if s else 0.0 for s in found]
    for name in ("embedding", "head"):
        if name in plan.tensors:
            rows[name] = [bits(plan.tensors[name])]
    return strips(rows, f"bits a weight by layer, {plan.method}: {plan.bits_per_weight:.2f} in all")
