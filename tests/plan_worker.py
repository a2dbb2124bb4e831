"""Subprocess of test_plan.py over the stub driver: records the launches that plans make, as the driver receives them.

Prints one line of JSON with the findings of each case.
"""

import json
import os
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton import knobs

sys.path.insert(0, str(Path(__file__).parent))

from bench.stub import arm

stub = arm()
driver = triton.runtime.driver.active
stream, current, entered = 0, 0, []
driver.get_current_stream = lambda device=None: stream
driver.get_current_device = lambda: current

from fused_steer.kernels import plan as plans  # noqa: E402
from fused_steer.kernels import planned_norm  # noqa: E402

from fused_steer import SteerConfig, patch_model  # noqa: E402
from fused_steer.adapters.factors import Adapter  # noqa: E402
from fused_steer.model.site import SteeringSite  # noqa: E402

D, R = 512, 8
made = []
_make = plans.Plan.make.__func__


def _counted(cls, *arguments):
    results, plan = _make(cls, *arguments)
    made.append(plan is not None)
    return results, plan


plans.Plan.make = classmethod(_counted)


def new_site(dtype=torch.float32) -> SteeringSite:
    site = SteeringSite()
    site.attach(
        "default", Adapter.of_tensors({"steer_down.weight": torch.randn(R, D), "steer_up.weight": torch.randn(D, R)})
    )
    site.use("default", "silu", 1.0)
    return site.to(dtype)


def hidden(tokens: int = 8, gradient: bool = False) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.bfloat16, requires_grad=gradient)


def called(call) -> tuple[list, list[bool]]:
    """Run a call; return its launches, reduced to the parts that calls share, and whether each tried plan was made."""
    before = len(made)
    with stub.launched() as found:
        call()
    return [[launch.name, launch.grid, launch.block, launch.shared] for launch in found], made[before:]


def last_launches(call) -> list:
    with stub.launched() as found:
        call()
    return found


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def same_launches():
    """Check that the second call, which uses a plan, makes the same launches as the first."""
    site, x, b = new_site(), hidden(), hidden()
    with torch.no_grad():
        first, second, third = (called(lambda: site(x, b)) for _ in range(3))
    return {"made": [first[1], second[1], third[1]], "same": first[0] == second[0] == third[0], "count": len(first[0])}


@case
def fp_fusion_of_the_environment():
    """Compare the code of launches with code compiled ahead of time, with TRITON_DEFAULT_FP_FUSION unset and 0."""
    from fused_steer.kernels import aot, launch, post_block

    x, b, down, up = hidden(), hidden(), torch.randn(R, D), torch.randn(D, R)
    job = aot.compilation(aot.record(aot.Case(8, D, R), "sm_90")[0], "sm_90")
    with launch.noted() as notes, torch.no_grad():
        post_block(x, b, down, up)
    for started in notes.launches:
        started.kernel.device_caches.clear()
    found = []
    # Code has the path of its source, and Triton's cache may hold the code of another checkout.
    knobs.compilation.always_compile = True
    for value in (None, "0"):
        os.environ.pop("TRITON_DEFAULT_FP_FUSION", None)
        if value is not None:
            os.environ["TRITON_DEFAULT_FP_FUSION"] = value
        with launch.noted() as notes, torch.no_grad():
            post_block(x, b, down, up)
        options = [started.compiled.metadata.enable_fp_fusion for started in notes.launches]
        binaries = [hash(started.compiled.asm["cubin"]) for started in notes.launches]
        found.append([options, binaries, hash(aot._build(job).asm["cubin"])])
        for started in notes.launches:
            started.kernel.device_caches.clear()  # so that the next launch compiles with the current options
    os.environ.pop("TRITON_DEFAULT_FP_FUSION")
    knobs.compilation.always_compile = False
    return {"found": found}


@case
def launcher():
    return {"direct": plans.starts_directly(driver.launcher_cls)}


@case
def same_launches_in_training():
    site, x, b, grad = new_site(), hidden(64, True), hidden(64, True), hidden(64)
    first, second = (called(lambda: site(x, b).backward(grad)) for _ in range(2))
    return {"made": [first[1], second[1]], "same": first[0] == second[0], "count": len(first[0])}


def count_calls(call, train: bool) -> int:
    """Run a step until its launch plans exist. Then count the calls of Python functions in one more step."""
    number = 0

    def note(frame, event, argument):
        nonlocal number
        number += event == "call" and "<lambda>" not in frame.f_code.co_name  # the stub driver has lambdas

    with torch.set_grad_enabled(train), torch.autograd.set_multithreading_enabled(False):
        for _ in range(3):
            call()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    return number


def calls_of_a_layer(count) -> dict[str, float]:
    """Return the calls that each further layer adds to a step, by a function of the layers and of whether to train."""
    return {
        name: (count(12, train) - count(4, train)) / 8 for name, train in (("inference", False), ("training", True))
    }


@case
def python_calls():
    """Count the calls of Python functions that each further layer adds to a step, in inference and in training."""
    from bench import host

    def count(layers: int, train: bool) -> int:
        case = host.HostCase(layers=layers)
        model, device = host.patched(case, torch.device("cpu")), torch.device("cpu")
        if train:
            return count_calls(host._train_call(model, case, device), True)
        x, branch = host._hidden(case, device), host._hidden(case, device)
        return count_calls(lambda: model(x, branch), False)

    return calls_of_a_layer(count)


class NormedBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(D, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, residual, branch):
        branch = branch + 2 * self.norm(residual)
        hidden_states = residual + branch
        return hidden_states


class NormedChain(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(hidden_size=D, num_hidden_layers=layers)
        self.layers = torch.nn.ModuleList(NormedBlock() for _ in range(layers))
        self.norm = torch.nn.RMSNorm(D, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, inputs_embeds, branch):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, branch)
        return self.norm(inputs_embeds)


def normed_step(layers: int, train: bool, fuse_norm: bool = True):
    """Return a step of a model with norms, and the model."""
    model = patch_model(NormedChain(layers), SteerConfig(rank=R), fuse_norm=fuse_norm)
    x, branch, grad = (torch.randn(64, 1, D, dtype=torch.bfloat16) for _ in range(3))
    leaves = [x, branch, *(p for p in model.parameters() if p.requires_grad)]
    if not train:
        return (lambda: model(x, branch)), model
    x.requires_grad_()
    branch.requires_grad_()
    return (lambda: torch.autograd.grad(model(x, branch), leaves, grad)), model


@case
def python_calls_with_norms():
    """The same for a model with an RMSNorm in each layer, fused and unfused."""
    return {
        name: calls_of_a_layer(lambda layers, train, fuse=fuse: count_calls(normed_step(layers, train, fuse)[0], train))
        for name, fuse in (("fused", True), ("unfused", False))
    }


@case
def same_launches_with_norms():
    """Check that a model with fused norms launches by plans: the same kernels as in the first step."""
    found = {}
    for plans_of_all in (planned_norm._inference, planned_norm._trained):
        plans_of_all.clear()
    for name, train in (("inference", False), ("training", True)):
        step, model = normed_step(3, train)
        with torch.set_grad_enabled(train):
            first, second, third = (called(step) for _ in range(3))
        knobs.runtime.launch_enter_hook.add(_see := lambda metadata: None)
        try:
            with torch.set_grad_enabled(train):
                ordinary = called(step)
        finally:
            knobs.runtime.launch_enter_hook.remove(_see)
        found[name] = {"made": [first[1], second[1], third[1]], "same": first[0] == second[0] == third[0],
                       "ordinary": ordinary[0] == second[0], "kernels": [row[0] for row in second[0]],
                       "norms": [entry.norm for entry in model.steering.report()]}  # fmt: skip
    return found


@case
def same_arguments():
    """Check that a plan's launch passes the driver the same numbers and addresses as Triton's own launch."""
    site, x, b, grad = new_site(), hidden(8, True), hidden(8, True), hidden()
    operands = {t.data_ptr() for t in (x, b, grad, *site.parameters())}
    given, watched, start = [], {}, plans._start

    def watch(number, launch, *rest):
        run, kinds = launch.compiled.run, list(launch.compiled.src.signature.values())
        if hasattr(run, "launch") and id(run) not in watched:
            watched[id(run)] = run, launch.compiled.name, run.launch

            def noted(*arguments):
                values = arguments[-1] if isinstance(arguments[-1], tuple) else arguments[-len(kinds) :]
                if len(values) == len(kinds):  # Triton passes constants too
                    values = [value for value, kind in zip(values, kinds, strict=True) if kind != "constexpr"]
                addresses = (v.data_ptr() if isinstance(v, Tensor) else v for v in values)
                others = ["other" if v not in operands and v > 1 << 32 else v for v in addresses]
                given.append([watched[id(run)][1], *others])
                return watched[id(run)][2](*arguments)

            run.launch = noted
        return start(number, launch, *rest)

    def launched(call) -> list:
        given.clear()
        call()
        return list(given)

    def infer() -> None:
        with torch.no_grad():
            site(x, b)

    def hook(metadata) -> None:
        """Stand in for a profiler's hook in Triton. With such a hook plans are not used."""

    found = {}
    plans._start = watch
    try:
        for name, call in {"inference": infer, "training": lambda: site(x, b).backward(grad)}.items():
            call()
            call()
            planned = launched(call)
            knobs.runtime.launch_enter_hook.add(hook)
            try:
                found[name] = {"same": planned == launched(call), "count": len(planned)}
            finally:
                knobs.runtime.launch_enter_hook.remove(hook)
            found[name]["read"] = sum(value in operands for row in planned for value in row)
    finally:
        plans._start = start
        for run, _, launch in watched.values():
            run.launch = launch
    return found


@case
def addresses_of_the_moment():
    """Check that the last launch's first argument is each call's own residual. The launch before packs the weights."""
    site, b = new_site(), hidden()
    states = [hidden() for _ in range(3)]
    with torch.no_grad():
        found = [last_launches(lambda x=x: site(x, b))[-1].first == x.data_ptr() for x in states]
    return {"found": found}


@case
def a_freed_tensors_address():
    """Check that a plan uses a weight's current address after another tensor has taken the weight's old memory."""
    site, x, b = new_site(), hidden(), hidden()
    with torch.no_grad():
        site(x, b)
        weight = site.steer_up["default"].weight
        old = weight.data_ptr()
        run = next(iter(site._planned[0]._inference.values()))
        seen = []
        kept = run.__globals__["pointer"]
        run.__globals__["pointer"] = lambda t: seen.append(kept(t)) or kept(t)
        weight.data = torch.randn(D, R)
        other = [torch.randn(D, R) for _ in range(8)]  # one of them may reuse the old weight's memory
        before = len(made)
        site(x, b)
    return {"moved": weight.data_ptr() != old, "read": weight.data_ptr() in seen, "stale": old in seen,
            "made": len(made) - before, "others": len(other)}  # fmt: skip


@case
def misaligned():
    """Check that a misaligned address uses no plan, but a kernel that does not assume multiples of 16 bytes."""
    site, x, b = new_site(), hidden(), hidden()
    shifted = torch.randn(8 * D + 1, dtype=torch.bfloat16)[1:].view(8, D)
    with torch.no_grad():
        site(x, b)
        aside, again = called(lambda: site(shifted, b)), called(lambda: site(x, b))
    return {"address": shifted.data_ptr() % 16, "aside": aside[1], "again": again[1], "count": len(aside[0])}


@case
def stream_of_the_moment():
    global stream
    site, x, b = new_site(), hidden(), hidden()
    found = []
    with torch.no_grad():
        for number in (0, 0, 48, 64, 0):
            stream = number
            found.append(sorted({launch.stream for launch in last_launches(lambda: site(x, b))}))
    return {"found": found}


@case
def another_device_is_current():
    """Check that the operands' device is made current around the launch, unless it already is."""
    global current
    site, x, b = new_site(), hidden(), hidden()
    entered.clear()

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            global current
            entered.append(str(self.device))
            self.before, current = current, self.device.index or 0

        def __exit__(self, *_):
            global current
            current = self.before

    seen = []
    driver.get_current_stream = lambda device=None: seen.append((device, current)) or 0
    on_device = plans.on_device
    plans.on_device = Current
    try:
        with torch.no_grad():
            site(x, b)
            site(x, b)
            quiet = list(entered)
            current = 1
            seen.clear()
            planned = called(lambda: site(x, b))
            after, current = current, 0
        gradient = hidden(64, True)
        grad = hidden(64)
        site(gradient, hidden(64)).backward(grad)
        entered_before = len(entered)
        current = 1
        trained = called(lambda: site(gradient, hidden(64)).backward(grad))
        current = 0
        around = len(entered) - entered_before
    finally:
        plans.on_device = on_device
        driver.get_current_stream = lambda device=None: stream
        current = 0
    return {"quiet": quiet, "planned": planned[1], "count": len(planned[0]), "seen": seen[:1], "after": after,
            "trained": trained[1], "around": around, "entered": entered[:1]}  # fmt: skip


@case
def hooks_of_launches():
    """Check that profilers' hooks, set before or after a plan is made, see every launch until they are removed."""
    site, x, b = new_site(), hidden(), hidden()
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    counts = []
    with torch.no_grad():
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            site(x, b)
            plain = len(called(lambda: site(x, b))[0])
            chain.add(hook)
            hooked = []
            for _ in range(2):
                seen.clear()
                hooked.append([len(last_launches(lambda: site(x, b))), len(seen)])
            chain.remove(hook)
            seen.clear()
            after = called(lambda: site(x, b))
            counts.append({"plain": plain, "hooked": hooked, "after": len(after[0]), "seen": len(seen),
                           "made": called(lambda: site(x, b))[1]})  # fmt: skip
        kept = knobs.runtime.launch_enter_hook
        knobs.runtime.launch_enter_hook = replaced = type(kept)()  # replace the whole chain of hooks
        replaced.add(hook)
        seen.clear()
        launched = len(last_launches(lambda: site(x, b)))
        counts.append({"launched": launched, "seen": len(seen)})
        knobs.runtime.launch_enter_hook = kept
    return counts


@case
def backend_between_calls():
    site, x, b = new_site(), hidden(), hidden()
    with torch.no_grad():
        site(x, b)
        os.environ["FUSED_STEER_BACKEND"] = "torch"
        by_torch = called(lambda: site(x, b)), site.backend
        os.environ["FUSED_STEER_BACKEND"] = "nonsense"
        try:
            site(x, b)
            refused = ""
        except RuntimeError as error:
            refused = str(error)
        del os.environ["FUSED_STEER_BACKEND"]
        again = called(lambda: site(x, b))
    return {"torch": len(by_torch[0][0]), "backend": by_torch[1], "refused": refused, "again": again[1],
            "count": len(again[0])}  # fmt: skip


@case
def threads():
    site, b = new_site(), hidden()
    wrong = []

    def work(tokens):
        try:
            x, branch = hidden(tokens), hidden(tokens)
            with torch.no_grad():
                for _ in range(50):
                    if site(x, branch).shape != x.shape:
                        wrong.append(tokens)
            for _ in range(20):
                x.requires_grad_()
                x.grad = None
                site(x, branch).backward(torch.ones_like(x))
                if x.grad.shape != x.shape:
                    wrong.append(tokens)
        except Exception as error:
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(tokens,)) for tokens in (4, 8, 16, 32)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"wrong": wrong, "rows": b.shape[0]}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Identity()

    def forward(self, residual, branch):
        hidden_states = residual + branch
        return hidden_states


class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(hidden_size=D, num_hidden_layers=2)
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, inputs_embeds, branch):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, branch)
        return inputs_embeds


@case
def compiled():
    """Check that a compiled graph makes one plan for all layers and launches the same as the eager model."""
    model = patch_model(Chain(), SteerConfig(rank=R))
    x, b = (torch.randn(8, 1, D, dtype=torch.bfloat16) for _ in "xb")
    with torch.no_grad():
        eager = called(lambda: model(x, b))
        graph = torch.compile(model, fullgraph=True, dynamic=False)
        calls = [called(lambda: graph(x, b)) for _ in range(4)]
    return {"same": all(call[0] == eager[0] for call in calls), "made": [call[1] for call in calls],
            "count": len(eager[0])}  # fmt: skip


@case
def generated_code():
    """Launches of the code that Inductor generated, which starts the layers itself."""
    global stream, current
    from torch._inductor.utils import run_and_get_code

    model = patch_model(Chain(), SteerConfig(rank=R))
    x, b, x2 = (torch.randn(8, 1, D, dtype=torch.bfloat16) for _ in "xbx")
    seen, around = [], []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    class Current:
        def __init__(self, device):
            pass

        def __enter__(self):
            around.append("begin")

        def __exit__(self, *_):
            around.append("end")

    on_device = plans.on_device
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # no code of another run
        graph = torch.compile(model, fullgraph=True, dynamic=False)
        plans.on_device = Current
        try:
            _, code = run_and_get_code(graph, x, b)
            graph(x, b)
        finally:
            plans.on_device = on_device
        planned = called(lambda: graph(x, b))
        streams = []
        for number in (48, 0):
            stream = number
            streams.append(sorted({launch.stream for launch in last_launches(lambda: graph(x, b))}))
        first = last_launches(lambda: graph(x2, b))[0].first == x2.data_ptr()
        around.clear()
        current = 1
        elsewhere, current = called(lambda: graph(x, b)), 0
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            hooked = called(lambda: graph(x, b))
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
    return {"started": "\n".join(code).count(" start_post_block_inference_silu_sum("), "made": planned[1],
            "streams": streams, "first": first, "elsewhere": elsewhere == planned, "around": around,
            "hooked": hooked[0] == planned[0], "seen": len(seen), "count": len(planned[0])}  # fmt: skip


@case
def rows_of_their_own():
    model = patch_model(Chain(), SteerConfig(rank=R))
    model.steering.add("other", SteerConfig(rank=R))
    x, b = (torch.randn(2, 1, D, dtype=torch.bfloat16) for _ in "xb")
    with torch.no_grad(), model.steering.batch(["default", "other"]):
        first, second = called(lambda: model(x, b)), called(lambda: model(x, b))
    return {"same": first[0] == second[0], "made": [first[1], second[1]], "count": len(second[0])}


def found(function):
    try:
        return function()
    except Exception:
        return traceback.format_exc()[-1500:]


print(json.dumps({name: found(function) for name, function in CASES.items()}))
