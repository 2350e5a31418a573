"""Peers on a GPU: one training step of one work by one of them, as a JSON line with its time and its peak of memory.

  python peers.py WORK PEER PRECISION [--batch N] [--runs N]

The works are those of `memory-report bench-peer`: mean y(1)² by RK4 over [0, 1], with gradients to θ and y0. The time is
the median over the runs after two that are not timed. The peak is that of the framework's allocator above what was live
before a step. Packages that are not where Python looks are found through PEERS, folders with colons between them.
"""
import argparse, contextlib, json, os, statistics, sys, time

sys.path[:0] = [folder for folder in os.environ.get("PEERS", "").split(":") if folder]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
MIB = 2**20

# name: (state, widths or channels, steps)
WORKS = {"W1": ((1024, 64), (64, 256, 256, 64), 64), "W3": ((16, 32, 16, 16), 32, 16), "W5": ((64, 64, 48, 48), 64, 4)}


def inputs(work, batch):
    """y0, then W and b of each layer, in F64."""
    import numpy as np
    rng = np.random.default_rng(0)
    shape, layers, steps = WORKS[work]
    shape = (batch or shape[0], *shape[1:])
    if isinstance(layers, int):
        sizes, tail = [(layers, layers)] * 2, (3, 3)
    else:
        sizes, tail = list(zip(layers[:-1], layers[1:])), ()
    parameters = []
    for n_in, n_out in sizes:
        fan_in = n_in * (9 if tail else 1)
        parameters += [rng.standard_normal((n_out, n_in) + tail) / fan_in**0.5, 0.1 * rng.standard_normal(n_out)]
    return parameters, rng.standard_normal(shape), bool(tail), steps


def torch_step(peer, precision, work, batch):
    import torch
    import torch.nn.functional as F
    parameters, y0, images, steps = inputs(work, batch)
    low = {"f32": None, "f16": torch.float16, "bf16": torch.bfloat16}[precision]
    new = lambda x: torch.tensor(x, dtype=torch.float32, device="cuda", requires_grad=True)

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.ParameterList(torch.nn.Parameter(new(p).detach()) for p in parameters)

        def forward(self, t, x):
            y, n = x, len(self.p)
            with torch.autocast("cuda", dtype=low) if low else contextlib.nullcontext():
                for i in range(0, n, 2):
                    w, b = self.p[i], self.p[i + 1]
                    y = F.conv2d(y, w, b, padding=1) if images else F.linear(y, w, b)
                    if i + 2 < n:
                        y = torch.relu(y) if images else torch.tanh(y)
            return y.to(x.dtype)

    f, y0, grid = Velocity(), new(y0), torch.linspace(0.0, 1.0, steps + 1, device="cuda")
    if peer == "torchdiffeq":
        from torchdiffeq import odeint
        solve = lambda: odeint(f, y0, grid[[0, -1]], method="rk4", options=dict(step_size=1.0 / steps))[-1]
    elif peer == "torchdiffeq-adjoint":
        from torchdiffeq import odeint_adjoint
        solve = lambda: odeint_adjoint(f, y0, grid[[0, -1]], method="rk4", options=dict(step_size=1.0 / steps))[-1]
    else:
        import rampde
        scaler = dict(loss_scaler=rampde.DynamicScaler(torch.float16)) if precision == "f16" else {}
        solve = lambda: rampde.odeint(f, y0, grid, method="rk4", **scaler)[-1]

    def step():
        torch.autograd.grad(solve().float().square().mean(), [*f.parameters(), y0])
        torch.cuda.synchronize()

    def peak():
        torch.cuda.reset_peak_memory_stats()
        live = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - live

    return step, peak, f"torch {torch.__version__}"


def jax_step(peer, precision, work, batch):
    import diffrax, jax
    import jax.numpy as jnp
    import numpy as np
    parameters, y0, images, steps = inputs(work, batch)
    low = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}[precision]
    parameters, y0 = [jnp.asarray(p, jnp.float32) for p in parameters], jnp.asarray(y0, jnp.float32)

    def f(t, x, p):
        y = x.astype(low)
        for i in range(0, len(p), 2):
            w, b = p[i].astype(low), p[i + 1].astype(low)
            y = jax.lax.conv(y, w, (1, 1), "SAME") + b[:, None, None] if images else y @ w.T + b
            if i + 2 < len(p):
                y = jax.nn.relu(y) if images else jnp.tanh(y)
        return y.astype(x.dtype)

    class Rk4(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([0.5, 0.5, 1.0]), b_sol=np.array([1, 2, 2, 1]) / 6, b_error=np.zeros(4),
            a_lower=tuple(np.array(row) for row in ([0.5], [0.0, 0.5], [0.0, 0.0, 1.0])))
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms):
            return 4

    adjoint = {"diffrax": diffrax.RecursiveCheckpointAdjoint, "diffrax-backsolve": diffrax.BacksolveAdjoint}[peer]()

    def loss(p, y):
        end = diffrax.diffeqsolve(diffrax.ODETerm(f), Rk4(), 0.0, 1.0, 1.0 / steps, y, args=p, adjoint=adjoint,
                                  max_steps=steps).ys[-1]
        return jnp.mean(end**2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parameters, y0).compile()
    analysis = compiled.memory_analysis()
    peak = lambda: analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return lambda: jax.block_until_ready(compiled(parameters, y0)), peak, f"jax {jax.__version__}, diffrax {diffrax.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("peer", choices=["torchdiffeq", "torchdiffeq-adjoint", "rampde", "diffrax", "diffrax-backsolve"])
    parser.add_argument("precision", choices=["f32", "f16", "bf16"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    row = dict(work=args.work, batch=args.batch, peer=args.peer, precision=args.precision)
    try:
        make = jax_step if args.peer.startswith("diffrax") else torch_step
        step, peak, version = make(args.peer, args.precision, args.work, args.batch)
        times = []
        for _ in range(args.runs + 2):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        row.update(version=version, wall_s=statistics.median(times[2:]), runs_s=times[2:], peak_mib=peak() / MIB)
    except Exception as error:  # a peer that is not there, or runs out of memory, is a row too
        row.update(failed=f"{type(error).__name__}: {error}"[:300])
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
