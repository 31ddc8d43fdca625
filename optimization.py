"""LAMB, the other optimizers, parameter groups, learning-rate schedules, and the one layout their state is saved in.

A parameter is known by its name in the model. Whether it decays, and whether it has a trust ratio, go by that name and
never by its number of dimensions: the kept values of an unstructured sparse layer are 1-D and are weights all the same.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kernels.build import KernelsUnavailable
from training.errors import UsageError

if TYPE_CHECKING:
    from kernels.lamb import LambKernels

BETAS = (0.9, 0.999)
EPS = 1e-6  # the recipe's, for every optimizer that has one; torch's own default is 1e-8
ADAPTER_LEAVES = ("lora_left", "lora_right")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Lamb(Optimizer):
    """LAMB (You et al., arXiv 1904.00962, Algorithm 2) with the semantics of NVIDIA's FusedLAMB.

    With G the norm of all gradients of all groups together, t the parameter's own step count, and per tensor:

        g     = grad / max(1, G / max_grad_norm)                    clipping comes first, and is global
        m     = beta1 m + (1 - beta1) g                             without grad_averaging: + g
        v     = beta2 v + (1 - beta2) g^2
        u     = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        ratio = |p| / |u|   where weight_decay != 0, the group's trust_ratio is True and both norms are > 0, else 1
        p     = p - lr ratio u

    Args:
        params: tensors or groups, as for any torch optimizer.
        lr: a number or a 0-dim tensor (a captured CUDA graph reads the tensor anew at each replay).
        bias_correction: False leaves out both divisions by 1 - beta^t.
        trust_ratio: False sets the ratio to 1 (NVIDIA's has no such choice, but for a weight_decay of 0).
        max_grad_norm: infinity turns clipping off.
        fused: True takes the fastest form for where the parameters are, and all forms give the same numbers to
            rounding: on CUDA the kernels of kernels/lamb.py, where they run (`lamb_kernels`) and all tensors are
            contiguous and fp32; else a few `torch._foreach_*` calls a group. False is the definition, one tensor at a
            time. No form transfers anything from the device.

    State of a parameter: `step` (int), `exp_avg`, `exp_avg_sq` (its shape; fp32 also for a half-precision parameter).
    Gradients are left as they are (NVIDIA's kernel overwrites them).
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_ratio: bool = True,
        max_grad_norm: float = 1.0,
        fused: bool = True,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "trust_ratio": trust_ratio,
        }
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.fused = fused
        self._kernels: dict[torch.device, LambKernels | None] = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if not any(members):
            return loss
        states = [[self._advance(p) for p in params] for params in members]
        kernels = self._kernels_on(next(filter(None, members))[0].device) if self.fused else None
        if kernels is not None and kernels.step(self.param_groups, members, states, self.max_grad_norm):
            return loss
        gradients = [p.grad for params in members for p in params]
        clip = (nn.utils.get_total_norm(gradients) / self.max_grad_norm).clamp(min=1.0)
        update_group = self._update_foreach if self.fused else self._update_each
        for group, params, own in zip(self.param_groups, members, states, strict=True):
            if params:
                update_group(group, params, own, clip)
        return loss

    def _kernels_on(self, device: torch.device) -> "LambKernels | None":
        if device not in self._kernels:
            try:
                self._kernels[device] = lamb_kernels(device)
            except KernelsUnavailable:
                self._kernels[device] = None
        return self._kernels[device]

    def _advance(self, parameter: Tensor) -> dict:
        """The parameter's state, with its step count moved on by one."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state.update({moment: _zero_moment(parameter) for moment in MOMENTS})
        state["step"] += 1
        return state

    def _update_each(self, group: dict, params: list[Tensor], states: list[dict], clip: Tensor) -> None:
        """The definition, one tensor at a time."""
        (beta1, beta2), eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
        for p, state in zip(params, states, strict=True):
            correction1, correction2 = _bias_corrections(group, state["step"])
            g = p.grad / clip
            m = state["exp_avg"].mul_(beta1).add_(g, alpha=_gradient_weight(group))
            v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = (m / correction1) / ((v / correction2).sqrt() + eps)
            scale = group["lr"]
            if weight_decay != 0:
                update = update.add(p, alpha=weight_decay)
            if _has_trust_ratio(group):
                scale = group["lr"] * _trust_ratio(torch.linalg.vector_norm(p), torch.linalg.vector_norm(update))
            p.sub_(update * scale)

    def _update_foreach(self, group: dict, params: list[Tensor], states: list[dict], clip: Tensor) -> None:
        """`_update_each` for the whole group at once, operation by operation."""
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        corrections1, corrections2 = zip(*(_bias_corrections(group, state["step"]) for state in states), strict=True)
        m = [state["exp_avg"] for state in states]
        v = [state["exp_avg_sq"] for state in states]
        g = torch._foreach_div([p.grad for p in params], clip)
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, g, alpha=_gradient_weight(group))
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        del g  # as large as the model; what follows needs room for two more of that size
        denominators = torch._foreach_div(v, corrections2)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(m, corrections1)
        torch._foreach_div_(updates, denominators)
        if weight_decay != 0:
            torch._foreach_add_(updates, params, alpha=weight_decay)
        if _has_trust_ratio(group):
            norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (params, updates)]
            torch._foreach_mul_(updates, (group["lr"] * _trust_ratio(*norms)).unbind())
        else:
            torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(params, updates)


def lamb_kernels(device: torch.device) -> "LambKernels":
    """What `Lamb` steps with on `device`.

    Raises:
        KernelsUnavailable: `Lamb` steps in its `torch._foreach_*` form there; the message says why, in one line.
    """
    if device.type != "cuda":
        raise KernelsUnavailable(f"LAMB's kernels need a CUDA device, and this is {device.type}")
    from kernels import lamb  # imports Triton, which CPU builds of torch lack

    lamb.check_device(device)
    return lamb.LambKernels(device)


def _zero_moment(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _gradient_weight(group: dict) -> float:
    return 1 - group["betas"][0] if group["grad_averaging"] else 1.0


def _bias_corrections(group: dict, step: int) -> tuple[float, float]:
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 - beta1**step, 1 - beta2**step


def _has_trust_ratio(group: dict) -> bool:
    """Whether LAMB scales the updates of a group's tensors by their trust ratios."""
    return group["trust_ratio"] and group["weight_decay"] != 0


def _trust_ratio(weight_norm: Tensor, update_norm: Tensor) -> Tensor:
    """|p| / |u|, and 1 where either is 0 (so a matrix that starts at 0 can leave it). Any shape, elementwise."""
    return torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)


# ---------------------------------------------------------------- building


def _group_of(name: str) -> str:
    """Which group a parameter belongs to: biases and LayerNorms never decay, adapters have a decay of their own."""
    *modules, leaf = name.split(".")
    if leaf in ADAPTER_LEAVES:
        return "adapters"
    return "no_decay" if leaf == "bias" or "LayerNorm" in modules else "decay"


def parameter_groups(
    model: nn.Module, weight_decay: float, lora_weight_decay: float, lora_lr_scale: float = 1.0
) -> list[dict]:
    """The trainable parameters in up to three groups: `decay`, `no_decay` (biases, LayerNorms), `adapters`.

    Each has `name`, `params`, `param_names`, `weight_decay`, `trust_ratio`, `lr_scale`; an empty group is left out. A
    tied parameter is listed once, under its first name.

    Args:
        lora_lr_scale: learning rate of the adapters over that of the others.

    Adapters have no trust ratio. Their right side starts at 0: LAMB's first step makes it as large as the learning
    rate, so from the second on the ratio would be that rate, and the adapters would stay where they are.
    """
    weight_decays = {"decay": weight_decay, "no_decay": 0.0, "adapters": lora_weight_decay}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        _named_group(group, [(name, p) for name, p in trainable if _group_of(name) == group], decay, lora_lr_scale)
        for group, decay in weight_decays.items()
    ]
    return [group for group in groups if group["params"]]


def _named_group(group: str, members: list[tuple[str, Tensor]], weight_decay: float, lora_lr_scale: float) -> dict:
    names, params = [name for name, _ in members], [p for _, p in members]
    lr_scale = lora_lr_scale if group == "adapters" else 1.0
    own = {"weight_decay": weight_decay, "trust_ratio": group == "decay", "lr_scale": lr_scale}
    return {"name": group, "params": params, "param_names": names, **own}


def _on_cuda(groups: list[dict]) -> bool:
    return all(p.is_cuda for group in groups for p in group["params"])


def _apex_fused_lamb() -> type[Optimizer] | None:
    """NVIDIA's FusedLAMB where this machine has it with its CUDA kernels, else None.

    PyPI's `apex` is an unrelated package of the same name: it has no `optimizers`, so it is not taken.
    """
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedLAMB
    except ImportError:
        return None
    return FusedLAMB if multi_tensor_applier.available else None


def _fused_lamb(groups: list[dict], lr: float, max_grad_norm: float) -> Optimizer:
    lamb = _apex_fused_lamb() if _on_cuda(groups) else None
    if lamb is None:
        return Lamb(groups, lr, max_grad_norm=max_grad_norm)
    return lamb(list(map(_for_apex, groups)), lr=lr, betas=BETAS, eps=EPS, max_grad_norm=max_grad_norm)


def _for_apex(group: dict) -> dict:
    """Apex's FusedLAMB leaves the trust ratio out where there is no decay, and nowhere else."""
    return group if group["trust_ratio"] else group | {"weight_decay": 0.0}


def _of_adam(groups: list[dict], scaled: bool) -> dict:
    return {"betas": BETAS, "eps": EPS, "fused": (_on_cuda(groups) and not scaled) or None}


# --optimizer's choices. `lamb` is ours, `fused-lamb` is apex's where there is one. `adamw` decouples the weight decay,
# `adam` adds it to the gradient, `sgd` has no momentum. On a GPU Adam is torch's fused one, one kernel over all of the
# state; not with loss scaling, where a fused step that overflows looks to hooks like one that was taken.
OPTIMIZERS = {
    "lamb": lambda groups, lr, max_grad_norm, _: Lamb(groups, lr, max_grad_norm=max_grad_norm),
    "fused-lamb": lambda groups, lr, max_grad_norm, _: _fused_lamb(groups, lr, max_grad_norm),
    "adamw": lambda groups, lr, _, scaled: torch.optim.AdamW(groups, lr=lr, **_of_adam(groups, scaled)),
    "adam": lambda groups, lr, _, scaled: torch.optim.Adam(groups, lr=lr, **_of_adam(groups, scaled)),
    "sgd": lambda groups, lr, _, __: torch.optim.SGD(groups, lr=lr),
}

# What a checkpoint calls the optimizer that wrote it, by class: every LAMB is one and the same.
KINDS = {"Lamb": "lamb", "FusedLAMB": "lamb", "AdamW": "adamw", "Adam": "adam", "SGD": "sgd"}


def build_optimizer(
    name: str, groups: list[dict], lr: float, max_grad_norm: float = 1.0, scaled: bool = False
) -> Optimizer:
    """The optimizer that `--optimizer` names, over `parameter_groups`. `max_grad_norm` is LAMB's own clipping.

    Args:
        scaled: whether losses are scaled, so that a step that overflows is left out.

    Raises:
        UsageError: a name that is not in OPTIMIZERS, or a norm of 0, which would clip every gradient to nothing.
    """
    if max_grad_norm <= 0:
        raise UsageError(f"--max_grad_norm {max_grad_norm:g}: must be above 0")
    if name not in OPTIMIZERS:
        raise UsageError(f"--optimizer {name}: not an optimizer of this suite; choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](groups, lr, max_grad_norm, scaled)


def optimizer_kind(optimizer: Optimizer) -> str:
    """`lamb` (ours and apex's), `adamw`, `adam` or `sgd`."""
    return KINDS[type(optimizer).__name__]


def _is_apex(optimizer: Optimizer) -> bool:
    return type(optimizer).__name__ == "FusedLAMB"


def clips_gradients(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step()` clips the global gradient norm itself, as LAMB does."""
    return optimizer_kind(optimizer) == "lamb"


def clip_gradients(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; returns the norm before (0-dim tensor)."""
    return nn.utils.clip_grad_norm_([p for _, p, _ in _named(optimizer)], max_norm)


def add_adapter_group(
    optimizer: Optimizer, model: nn.Module, lora_weight_decay: float, lora_lr_scale: float = 1.0
) -> None:
    """Let the optimizer train the model's new adapters, from step 0; no other parameter's state is touched.

    Raises:
        ValueError: the model has no adapter that the optimizer does not train already.
    """
    known = {p for _, p, _ in _named(optimizer)}
    new = [(n, p) for n, p in model.named_parameters() if _group_of(n) == "adapters" and p not in known]
    if not new:
        raise ValueError("the model has no adapters that are new to the optimizer: add them to the model first")
    lr = optimizer.param_groups[0]["lr"]  # until `set_learning_rate`
    group = _named_group("adapters", new, lora_weight_decay, lora_lr_scale)
    optimizer.add_param_group((_for_apex(group) if _is_apex(optimizer) else group) | {"lr": lr})


def _named(optimizer: Optimizer) -> list[tuple[str, Tensor, dict]]:
    """(name, parameter, its group) of everything that the optimizer trains."""
    return [
        (name, p, group)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


# ---------------------------------------------------------------- state in checkpoints


def optimizer_state(optimizer: Optimizer) -> dict:
    """The optimizer's state by parameter name, in one layout whichever implementation wrote it.

    `{"optimizer": kind, "state": {name: {"step": int, "exp_avg": tensor, "exp_avg_sq": tensor}}}`; `state` is empty
    for `sgd`, which has none. A parameter not stepped yet is at step 0 with moments of 0. The tensors are the
    optimizer's own: clone what has to outlive the next step. Loads with `torch.load(weights_only=True)`.
    """
    kind = optimizer_kind(optimizer)
    if kind == "sgd":
        return {"optimizer": kind, "state": {}}
    state = {}
    for name, p, group in _named(optimizer):
        own = optimizer.state.get(p, {})
        step = own.get("step", group.get("step", 0))  # apex keeps one count a group, the others one a parameter
        moments = {m: own[m].detach() if m in own else _zero_moment(p) for m in MOMENTS}
        state[name] = {"step": int(step), **moments}
    return {"optimizer": kind, "state": state}


def load_optimizer_state(optimizer: Optimizer, saved: dict) -> None:
    """Copy `saved` (from `optimizer_state`) into an optimizer of the same kind, by parameter name.

    Adapters (parameters whose last name is `lora_left` or `lora_right`) start fresh when `saved` has no adapter at
    all: it was written before they joined. An error leaves the optimizer as it was.

    Raises:
        UsageError: another kind of optimizer; a missing or foreign parameter; another shape; or steps that apex's
            single count per group cannot hold.
    """
    kind, state = optimizer_kind(optimizer), saved["state"]
    if saved["optimizer"] != kind:
        raise UsageError(f"--optimizer is of kind {kind}, but the checkpoint's is {saved['optimizer']}: give that one")
    if kind == "sgd":
        return
    entries = _named(optimizer)
    if not any(_group_of(name) == "adapters" for name in state):
        entries = [entry for entry in entries if _group_of(entry[0]) != "adapters"]
    _check_names_and_shapes({name: p for name, p, _ in entries}, state)
    steps_in_group = _is_apex(optimizer)
    if steps_in_group:
        _check_one_step_per_group(optimizer, state)
    for name, p, group in entries:
        step, own = state[name]["step"], {m: state[name][m].to(_zero_moment(p), copy=True) for m in MOMENTS}
        if steps_in_group:
            group["step"] = step
        else:
            own["step"] = step if kind == "lamb" else torch.tensor(float(step), device=_device_of_steps(p, group))
        optimizer.state[p] = own


def _device_of_steps(p: Tensor, group: dict) -> torch.device:
    """Where Adam counts them."""
    return p.device if group["fused"] else torch.device("cpu")


def _check_names_and_shapes(parameters: dict[str, Tensor], state: dict[str, dict]) -> None:
    faults = [f"lacks {name}" for name in parameters if name not in state]
    faults += [f"has {name}, which this model lacks" for name in state if name not in parameters]
    faults += [
        f"has {moment} of {name} in shape {list(state[name][moment].shape)}, which is {list(p.shape)} here"
        for name, p in parameters.items()
        for moment in MOMENTS
        if name in state and state[name][moment].shape != p.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more such)" if len(faults) > 1 else ""
        raise UsageError(f"the checkpoint's optimizer state {faults[0]}{more}: give the flags it was written with")


def _check_one_step_per_group(optimizer: Optimizer, state: dict[str, dict]) -> None:
    for group in optimizer.param_groups:
        steps = sorted({state[name]["step"] for name in group["param_names"] if name in state})
        if len(steps) > 1:
            raise UsageError(
                f"--optimizer fused-lamb: apex keeps one step count for the group {group['name']}, but the checkpoint "
                f"has {', '.join(map(str, steps))} in it: use --optimizer lamb"
            )


def reset_steps(optimizer: Optimizer) -> None:
    """Set every step count to 0 and keep the moments: what a new phase starts with, as in NVIDIA's BERT suite."""
    for holder in (*optimizer.state.values(), *optimizer.param_groups):
        if "step" in holder:
            holder["step"] = holder["step"] * 0  # a number or a tensor, and stays what it is


# ---------------------------------------------------------------- learning rate

# What is left of the base rate after warm-up, from `elapsed` (share of the phase before this step) and `decayed`
# (share of the steps after warm-up before this one), both in [0, 1). `poly` counts from the phase's start, as the
# published schedule does, so its rate drops where warm-up ends; the others start there from the full rate.
DECAYS = {
    "poly": lambda elapsed, decayed, degree: (1 - elapsed) ** degree,
    "linear": lambda elapsed, decayed, degree: 1 - decayed,
    "cosine": lambda elapsed, decayed, degree: (1 + math.cos(math.pi * decayed)) / 2,
    "constant": lambda elapsed, decayed, degree: 1.0,
}


def learning_rate(
    step: int, *, base: float, total_steps: int, warmup_proportion: float, decay: str, degree: float = 0.5
) -> float:
    """The learning rate of optimizer step `step`, counted from 1 within a phase of `total_steps`.

    While step / total_steps < warmup_proportion the rate rises in proportion to the step, towards `base`; after that
    `decay` takes over. NVIDIA's PolyWarmUpScheduler has the same warm-up but (1 - step / total_steps)^degree after it,
    so its last step has rate 0 and changes nothing. Here the decay counts the steps before this one, one fewer: every
    step learns, and the rest of the curve is NVIDIA's, one step later.

    Raises:
        UsageError: `decay` is not in DECAYS, or `warmup_proportion` is not in [0, 1].
        ValueError: `step` is not in 1 .. total_steps.
    """
    if decay not in DECAYS:
        raise UsageError(f"--lr_decay {decay}: not a schedule of this suite; choose one of {', '.join(DECAYS)}")
    if not 0 <= warmup_proportion <= 1:
        raise UsageError(f"--warmup_proportion {warmup_proportion}: must be a share of the steps, between 0 and 1")
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is outside the phase's 1 .. {total_steps}")
    warmup_steps = max(0, math.ceil(round(warmup_proportion * total_steps, 6)) - 1)  # those below the proportion
    if step <= warmup_steps:
        return base * (step / total_steps) / warmup_proportion
    elapsed = (step - 1) / total_steps
    decayed = (step - 1 - warmup_steps) / (total_steps - warmup_steps)
    return base * DECAYS[decay](elapsed, decayed, degree)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`, times its scale, in place where the optimizer keeps it in a tensor."""
    for group in optimizer.param_groups:
        own = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
