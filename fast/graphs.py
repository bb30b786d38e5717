"""CUDA graphs: a small model's time on a GPU is the time to launch its kernels, some 200 a forward.
A step with fixed shapes is recorded once and replayed."""
import torch

KEPT = 8       # states of decodes that are kept; each holds a KV cache
RECORDED = {}  # key -> state


def recorded(model, key, make, generator):
    """The state of a decode with fixed shapes, kept from call to call, and step(name, function).

    step runs a function of that state: the first time as it is, then, on a GPU, recorded as a
    graph, afterwards replayed. The weights may change in between, in place. Random draws come
    from a generator of the state's own, seeded from the given one."""
    key = (id(model), *key)
    if key not in RECORDED:
        while len(RECORDED) >= KEPT:
            del RECORDED[next(iter(RECORDED))]
        s = make()
        s.generator, s.graphs = torch.Generator(s.cache.k.device), {}
        RECORDED[key] = s
    s = RECORDED[key]
    if generator is not None:
        seed = torch.randint(2 ** 62, (1,), generator=generator, device=generator.device)
        s.generator.manual_seed(int(seed))

    def step(name, function):
        if name not in s.graphs or not s.cache.k.is_cuda:
            s.graphs[name] = None
            return function()
        if s.graphs[name] is None:
            s.graphs[name] = torch.cuda.CUDAGraph()
            s.graphs[name].register_generator_state(s.generator)
            with torch.cuda.graph(s.graphs[name]):
                function()
        s.graphs[name].replay()
    return s, step
