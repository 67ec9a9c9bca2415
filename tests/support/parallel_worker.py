"""What each of several processes finds that share a model: run by torchrun, with a folder for the
results. See tests/diffusers/test_diffusers_parallel.py."""

import sys
import warnings

import diffusers
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from colt5_vision import distill_routers, route_attention, routed_layers, unroute_attention
from tests.support.diffusers_cases import CASES, arguments, config, spread
from tests.support.diffusers_cases import build as build_case
from tests.support.diffusers_models import MODELS, build, outputs
from tests.support.diffusers_models.tiny import tokens
from tests.support.diffusers_models.videos import wan

WAN, QWEN = "WanTransformer3DModel", "QwenImageTransformer2DModel"
FLUX, FLUX2 = "FluxTransformer2DModel", "Flux2Transformer2DModel"
PIXART = "PixArtTransformer2DModel"
HELIOS, OVIS = "HeliosTransformer3DModel", "OvisImageTransformer2DModel"
ROUTED = {
    "all": {"num_heavy_tokens_kv": 1.0},
    "sampled": {"num_heavy_tokens_kv": 0.25},
    "some queries": {"num_heavy_tokens_kv": 0.25, "num_heavy_tokens_q": 0.5},
    **{
        router: {"num_heavy_tokens_kv": 0.25, "router": router}
        for router in ("learned", "mean_query", "grid")
    },
}
TENSOR = {f"tensor, {name}": ROUTED[name] for name in ("all", "sampled", "learned")}
TEXT = {  # models with a text in the sequence, and what they are called with
    f"{name}, {how}": (model, kind, ROUTED[how])
    for name, model, kind in (
        ("Qwen-Image", QWEN, "text"),
        ("Qwen-Image with a mask", QWEN, "mask"),
        ("Qwen-Image, two images", QWEN, "images"),
        ("Flux", FLUX, "text"),
        ("FLUX.2", FLUX2, "text"),
        ("FLUX.2, two images", FLUX2, "images"),
        ("odd text", FLUX, "odd"),
    )
    for how in ("all", "sampled", "learned")
}
GRADIENTS = {
    f"{name}, {how}": (model, kind, ROUTED[how])
    for name, model, kind in (
        ("Wan", WAN, "text"),
        ("Qwen-Image", QWEN, "mask"),
        ("FLUX.2", FLUX2, "images"),
        ("checkpointed", FLUX, "text"),
    )
    for how in ("all", "sampled", "learned")
}
PART = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
WHOLE = ContextParallelOutput(gather_dim=1, expected_dims=3)
ULYSSES = {"ulysses_degree": 2}
ANYTHING = ULYSSES | {"ulysses_anything": True}


def call(name: str, kind: str) -> dict:
    given = MODELS[name].call(MODELS[name].grid, 1) | {"return_dict": False}
    mask = given.pop("encoder_hidden_states_mask", None)
    if kind != "odd":  # an even number of tokens
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :4]
        if "txt_ids" in given:
            given["txt_ids"] = given["txt_ids"][..., :4, :]
    if kind == "mask":
        given["encoder_hidden_states_mask"] = mask[:, :4].clone()
        given["encoder_hidden_states_mask"][:, 1] = False
    if kind == "images":
        add_image(given)
    return given


def add_image(given: dict) -> None:
    """An image to edit, behind the map."""
    channels = given["hidden_states"].shape[-1]
    other = tokens((1, 2, 3), 1, channels)
    given["hidden_states"] = torch.cat([given["hidden_states"], other], 1)
    if "img_shapes" in given:
        given["img_shapes"] = [[given["img_shapes"][0][0], (1, 2, 3)]]
    else:
        ids = given["img_ids"][:, :6].clone()
        ids[..., 0] = 10
        given["img_ids"] = torch.cat([given["img_ids"], ids], 1)


def route(model: nn.Module, **how):
    torch.manual_seed(0)
    report = route_attention(model, **{"window_size": 2, "min_tokens": 1} | how)
    for layer in routed_layers(model).values():
        if how.get("router") == "learned":
            nn.init.normal_(layer.attention.correction[-1].weight, std=3)
    return report


def run(model: nn.Module, given: dict) -> torch.Tensor:
    return torch.cat([x.flatten() for x in outputs(model(**given))])


def compare(name, model=None, kind="text", parallel=None, plan=None, **how):
    """Outputs without routing, of one process, and of several; calls routed and exact; the model.

    Without routing, of several processes that route nothing: ``stock`` may be all keys.
    """
    model, given = build(name) if model is None else model, call(name, kind)
    with torch.no_grad():
        stock = run(model, given)
        report = route(model, **how)
        alone = run(model, given)
        report.reset_calls()
        model.enable_parallelism(config=parallel or ContextParallelConfig(**ULYSSES), cp_plan=plan)
        together = run(model, given)
    return (stock, alone, together, report.calls.routed, dict(report.calls.exact)), model


def _wide(value):
    wide = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if wide else value


def gradients(name, kind, checkpointed, how):
    """Gradients of one process, and the sum of those of several; calls routed and exact."""
    found = []
    # wide: in float32 rounding alone is 6e-5 of a router's gradient
    given = {name: _wide(value) for name, value in call(name, kind).items()}
    for parallel in (False, True):
        model = build(name).train().double()
        report = route(model, **how)
        if checkpointed:
            model.enable_gradient_checkpointing()
        if parallel:
            model.enable_parallelism(config=ContextParallelConfig(**ULYSSES))
        out = run(model, given)
        (out * torch.linspace(-1, 1, len(out))).sum().backward()
        of_model = [p.grad for p in model.parameters() if p.grad is not None]
        layers = routed_layers(model).values()
        of_routers = [p.grad for one in layers for p in one.attention.parameters()]
        for grad in (*of_model, *of_routers) if parallel else ():
            distributed.all_reduce(grad)
        found.append(
            [torch.cat([x.flatten() for x in one]) for one in (of_model, of_routers) if one]
        )
    return found, report.calls.routed, dict(report.calls.exact)


def compiled() -> tuple:
    """Outputs and summed gradients of blocks compiled one by one, and those of one process."""
    given, weigh = call(FLUX, "text"), lambda out: (out * torch.linspace(-1, 1, len(out))).sum()
    found = []
    for several in (False, True):
        model = build(FLUX).train()
        route(model, **ROUTED["sampled"])
        if several:
            model.enable_parallelism(config=ContextParallelConfig(**ULYSSES))
            torch._C._accelerator_getAccelerator = ACCELERATOR  # the compiler asks for one
            model.compile_repeated_blocks(backend="eager")
        with torch.no_grad():
            plain = run(model, given)
        out = run(model, given)
        weigh(out).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if several:
            distributed.all_reduce(grad)
        found.append((plain, out.detach(), grad))
    return tuple(found)


def helios_plan(layers: int) -> dict:
    """Helios' own plan is of 40 layers."""
    plan: dict = {"blocks.*.attn1": {"hidden_states": PART, "rotary_emb": PART}}
    return plan | {f"blocks.{i}.attn1": WHOLE for i in range(layers)}


def ulysses() -> dict:
    """Every process has all tokens of some heads."""
    found = {key: compare(WAN, **how)[0] for key, how in ROUTED.items()}
    anything = ContextParallelConfig(**ANYTHING)
    three = spread(wan(num_attention_heads=3))
    learned = ROUTED["learned"]
    found["three heads"] = compare(WAN, three, parallel=anything, **learned)[0]
    for key, (name, kind, how) in TEXT.items():
        parallel = anything if kind == "odd" else None
        found[key] = compare(name, kind=kind, parallel=parallel, **how)[0]
    for key in ("all", "sampled"):
        plan = helios_plan(len(build(HELIOS).blocks))
        found[f"history, {key}"] = compare(HELIOS, plan=plan, **ROUTED[key])[0]
    return found


def exact() -> dict:
    """What stays exact, and is counted."""
    found = {"grouped": compare(WAN, num_heavy_tokens_kv=0.25, router="grouped")[0]}
    found["schedule"] = compare(
        QWEN, num_heavy_tokens_kv=0.25, schedule=[{"min_timestep": 0.0, "full": True}]
    )[0]
    plan = diffusers.FluxTransformer2DModel._cp_plan
    found["a plan of one's own"] = compare(OVIS, plan=plan, **ROUTED["all"])[0]
    return found


def tensor() -> dict:
    """Tensor parallelism: likewise, with the text."""
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    parallel = TensorParallelConfig(tp_degree=2)
    return {key: compare(QWEN, parallel=parallel, **how)[0] for key, how in TENSOR.items()}


def distilled() -> tuple:
    _, model = compare(WAN, **ROUTED["learned"])

    def weights():
        found = [one.attention.correction[-1].weight for one in routed_layers(model).values()]
        return torch.cat(found).detach().clone()

    before = weights()
    history = distill_routers(model, [call(WAN, "text")], steps=2, lr=0.1, progress=False)
    return history, before, weights()


def undone() -> tuple:
    """Outputs of several processes before routing, and after it is undone."""
    found = []
    model, given = build(QWEN), call(QWEN, "text")
    model.enable_parallelism(config=ContextParallelConfig(**ULYSSES))
    with torch.no_grad():
        found.append(run(model, given))
        route(model)
        run(model, given)
        unroute_attention(model)
        found.append(run(model, given))
    return tuple(found)


def unexchanged() -> tuple:
    """Processors that exchange nothing attend to their part: outputs before and after routing."""
    plan = {"transformer_blocks.0": {"hidden_states": PART}, "proj_out": WHOLE}
    model, given = build(PIXART), call(PIXART, "text")
    model.enable_parallelism(config=ContextParallelConfig(**ULYSSES), cp_plan=plan)
    with torch.no_grad():
        before = run(model, given)
        report = route(model)
        return before, run(model, given), report.calls.routed, dict(report.calls.exact)


def ring() -> list[str]:
    """Ring attention is refused in either order."""
    parallel, refused = ContextParallelConfig(ring_degree=2), []

    def refuse(function, *args, **how):
        try:
            function(*args, **how)
        except ValueError as error:
            refused.append(str(error))

    model = build(WAN)
    route(model)
    model.enable_parallelism(config=parallel)
    refuse(run, model, call(WAN, "text"))
    model = build(WAN)
    model.enable_parallelism(config=parallel)
    refuse(route_attention, model, min_tokens=1)
    return refused


def ddp() -> list[torch.Tensor]:
    """A router that no forward uses has no gradient."""
    losses = []
    for how in ({"min_tokens": 200}, {"schedule": [{"min_timestep": 400, "full": True}]}, {}):
        model = build_case(CASES["sd15"], torch.float32).train()
        route_attention(model, config(router="learned", **how))
        parallel = DistributedDataParallel(model)
        for seed in range(2):
            given = arguments(CASES["sd15"], dtype=torch.float32, seed=seed)
            loss = parallel(**given, return_dict=False)[0].square().mean()
            loss.backward()
            losses.append(loss.detach())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    distributed.init_process_group("gloo")
    ACCELERATOR = torch._C._accelerator_getAccelerator
    torch._C._accelerator_getAccelerator = lambda: torch.device("cpu")  # as one of an accelerator
    results = {"exact": exact(), "distilled": distilled(), "undone": undone(), "ring": ring()}
    results["unexchanged"] = unexchanged()
    results |= {"routed": ulysses() | tensor(), "ddp": ddp()}
    results["gradients"] = {
        key: gradients(name, kind, key.startswith("checkpointed"), how)
        for key, (name, kind, how) in GRADIENTS.items()
    }
    results["compiled"] = compiled()
    torch.save(results, f"{sys.argv[1]}/{distributed.get_rank()}.pt")
    distributed.destroy_process_group()
