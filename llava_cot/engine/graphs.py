"""Steps as CUDA graphs: captured once for a rounded shape, and replayed on the same buffers afterwards.

A step is a function of static buffers. On the CPU it is called; on CUDA it is captured, and then replayed. There are
two kinds: ``Replay`` passes one token of each of many sequences through the model, and ``Window`` draws several tokens
for every growing branch before the host looks at the first.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from operator import add
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from llava_cot.engine.batch import Batch, Trail, shared_prefixes
from llava_cot.engine.branch import Branch
from llava_cot.engine.canary import Read
from llava_cot.engine.draw import Candidates, Drawn, Run, draw
from llava_cot.engine.model import ModelView
from llava_cot.engine.packed import Packed
from llava_cot.engine.session import Slot
from llava_cot_kernels.page_pool import PagePool
from llava_cot_kernels.stage_tags import StageTags

MAX_EOS_TOKEN_IDS = 32
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
MIN_PAGES, MIN_SEGMENTS = 16, 4  # one segment stays one: then the rows of a step need no sorting by image
MAX_BYTES = 2 << 30  # of the captured steps of one kind

Step = Callable[[], object]
Buffers = TypeVar("Buffers")


class Shape(NamedTuple):
    """Of the buffers of a step: rounded up, so that few are captured."""

    rows: int
    pages: int  # of a row's page table
    segments: int  # of the image store
    prefixes: int  # that rows share
    has_blind_rows: bool = False

    @classmethod
    def with_room(cls, rows: int, pages: int, segments: int, prefixes: int, has_blind_rows: bool = False) -> "Shape":
        return cls(
            next((size for size in ROWS if size >= rows), -(-rows // ROWS[-1]) * ROWS[-1]),
            _power_of_two(max(MIN_PAGES, pages)),
            _power_of_two(max(MIN_SEGMENTS, segments)) if segments > 1 else 1,
            _power_of_two(prefixes) if prefixes else 0,
            has_blind_rows,
        )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class Recorder:
    """Runs a step again on the same tensors: by calling it, which is all that a CPU needs."""

    def capture(self, step: Step) -> Step:
        return step


class CudaRecorder(Recorder):
    """Captures steps into CUDA graphs that share one memory pool, so that only one of them may run at a time.

    An empty graph keeps the pool in use for as long as the recorder lives. Without it, a pool may outlive all of its
    graphs, since cuBLAS keeps a workspace there, and PyTorch refuses to capture into a pool that nothing uses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _capture_stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._keeps_pool = self._record(lambda: None)

    def capture(self, step: Step) -> Step:
        """Run ``step`` once, then capture it. A ``step`` that raises or waits for the device is not captured."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # of the capture: cuBLAS allocates its workspace here, outside of the pool
            step()
        current.wait_stream(self.stream)
        return self._record(step).replay

    def _record(self, step: Step) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        # torch leaves neither the stream nor the pool of a capture that fails.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with recording:
                    step()
            except BaseException:
                with suppress(RuntimeError):  # it has left the pool
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                raise
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device, since cuBLAS keeps a workspace for each stream that it has worked on."""
    return torch.cuda.Stream(device)


def open_recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else Recorder()


class CapturedSteps(Generic[Buffers]):
    """Captured steps of one kind, by shape.

    While they hold more than ``max_bytes``, the least recently used is evicted. Kinds of steps may share a
    ``recorder`` if they never run at the same time.
    """

    def __init__(self, device: torch.device, recorder: Recorder, max_bytes: int = MAX_BYTES) -> None:
        self.device, self.recorder, self.max_bytes = device, recorder, max_bytes
        self._entries: OrderedDict[Shape, tuple[Buffers, Step, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers or, on CUDA, of everything that opening and capturing took."""
        return sum(size for _, _, size in self._entries.values())

    def get(
        self, shape: Shape, open_buffers: Callable[[], Buffers], step: Callable[[Buffers], None]
    ) -> tuple[Buffers, Step]:
        """The buffers of ``shape``, and a function that runs ``step`` on them."""
        if shape not in self._entries:
            free = self._free_bytes()
            buffers = open_buffers()
            run = self.recorder.capture(lambda: step(buffers))
            held = sum(value.nbytes for value in vars(buffers).values() if isinstance(value, torch.Tensor))
            self._entries[shape] = buffers, run, max(held, free - self._free_bytes())
            while len(self) > 1 and self.nbytes > self.max_bytes:  # no graph runs now: capturing waits for the device
                self._entries.popitem(last=False)
        self._entries.move_to_end(shape)
        buffers, run, _ = self._entries[shape]
        return buffers, run

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # as capturing does: the difference is what stays
        return torch.cuda.mem_get_info(self.device)[0]


class PassBuffers:
    """Room for R rows; those that a pass does not need are idle: they read and write nothing."""

    def __init__(self, shape: Shape, view: ModelView) -> None:
        rows, device = shape.rows, view.device
        self.token, self.position = torch.zeros(2, rows, dtype=torch.int64, device=device)
        slot_mapping = torch.full((rows,), -1, device=device)
        image_group, prefix_group = torch.full((2, rows), -1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(rows, shape.pages, dtype=torch.int32, device=device)
        self.batch = Batch(
            slot_mapping=slot_mapping,
            page_table=self.page_table,
            seq_lens=torch.zeros(rows, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=device),
            prefix_group=prefix_group if shape.prefixes else None,
            prefix_lens=torch.zeros(shape.prefixes, dtype=torch.int32, device=device) if shape.prefixes else None,
            image_group=image_group if view.cross_layers else None,
            image_cu_seqlens=torch.zeros(shape.segments + 1, dtype=torch.int64, device=device)
            if view.cross_layers
            else None,
            has_blind_rows=shape.has_blind_rows,
            trail=Trail.behind(torch.zeros_like(self.token)) if view.canary is not None else None,
        )
        self.logits = torch.zeros(rows, view.vocab_size, dtype=view.dtype, device=device)


class Replay:
    """``view.decode`` where every sequence has one token."""

    def __init__(self, view: ModelView, recorder: Recorder) -> None:
        self.view = view
        self.captured = CapturedSteps[PassBuffers](view.device, recorder)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """As ``view.decode``; the logits are overwritten by the next call."""
        assert batch.page_table is not None
        n, pages = batch.page_table.shape
        segments = 0 if batch.image_cu_seqlens is None else len(batch.image_cu_seqlens) - 1
        prefixes = 0 if batch.prefix_lens is None else len(batch.prefix_lens)
        shape = Shape.with_room(n, pages, segments, prefixes, batch.has_blind_rows)
        to, run = self.captured.get(shape, lambda: PassBuffers(shape, self.view), self.step)
        to.token[:n], to.position[:n] = token_ids, positions
        for name, idle in (("slot_mapping", -1), ("seq_lens", 0), ("image_group", -1), ("prefix_group", -1)):
            _fill(getattr(to.batch, name), getattr(batch, name), idle)
        _fill(to.batch.prefix_lens, batch.prefix_lens, 0)
        _fill(to.batch.image_cu_seqlens, batch.image_cu_seqlens, None)
        to.page_table[:n, :pages] = batch.page_table
        if to.batch.trail is not None and batch.trail is not None:
            to.batch.trail.words[:n] = batch.trail.words
            to.batch.trail.is_broken.zero_()
        run()
        if to.batch.trail is not None and batch.trail is not None:
            batch.trail.is_broken.copy_(to.batch.trail.is_broken[:n])
        return to.logits[:n]

    def step(self, at: PassBuffers) -> None:
        at.logits.copy_(self.view.decode(at.token, at.position, at.batch))


def _fill(buffer: torch.Tensor | None, values: torch.Tensor | None, rest: int | None) -> None:
    """``rest`` None repeats the last value."""
    if buffer is not None and values is not None:
        buffer[: len(values)] = values
        buffer[len(values) :] = values[-1:] if rest is None else rest


class StepBuffers:
    """What a step reads and writes, at addresses that stay: R rows, one for each growing branch, the others idle.

    A row whose branch has finished is idle too: its token is neither computed, stored nor drawn again.
    """

    def __init__(
        self, shape: Shape, num_steps: int, num_tags: int, device: torch.device, *, has_trail: bool = False
    ) -> None:
        rows = shape.rows
        integers, small, reals = torch.int64, torch.int32, torch.float32
        self.inputs = Packed(
            {
                # What the sampler is asked, of each row.
                **dict.fromkeys(("row", "top_k", "seed", "position"), (integers, (rows,))),
                **dict.fromkeys(("temperature", "top_p", "min_p"), (reals, (rows,))),
                "tag_state": (small, (rows,)),
                # What else belongs to a row; its rotary positions begin at ``offset``.
                **dict.fromkeys(("token", "offset", "left"), (integers, (rows,))),
                **dict.fromkeys(("image_group", "prefix_group"), (small, (rows,))),
                "ends": (torch.bool, (rows, num_tags + 1)),  # by tag; the last column is for no tag
                "slot_mapping": (integers, (num_steps, rows)),
                "page_table": (small, (rows, shape.pages)),
                # What belongs to all.
                "image_cu_seqlens": (integers, (shape.segments + 1,)),
                "prefix_lens": (small, (shape.prefixes,)),
                "step": (integers, (1,)),
            },
            device,
        )
        tensors = self.inputs.tensors
        self.candidates = Candidates(**{name: tensors[name] for name in Candidates._fields})
        self.token, self.offset, self.left = tensors["token"], tensors["offset"], tensors["left"]
        self.image_group, self.prefix_group = tensors["image_group"], tensors["prefix_group"]
        self.ends, self.slot_mapping, self.page_table = tensors["ends"], tensors["slot_mapping"], tensors["page_table"]
        self.image_cu_seqlens, self.prefix_lens = tensors["image_cu_seqlens"], tensors["prefix_lens"]
        self.step = tensors["step"]
        self.inputs.arrays["row"][:] = range(rows)
        self.inputs.arrays["top_p"].fill(1)  # of idle rows too the parameters must be valid
        self.inputs.upload()
        self.seqs = list[int]()  # the sequences whose parameters the first rows have; no other is ever named so
        self.has_blind_rows = shape.has_blind_rows
        self.trail = Trail.behind(torch.zeros_like(self.token)) if has_trail else None
        self.cu_seqlens_q = torch.arange(rows + 1, dtype=small, device=device)
        self.drawn = Drawn(
            torch.zeros(num_steps, 4, rows, dtype=integers, device=device),
            torch.zeros(num_steps, 4, rows, dtype=reals, device=device),
        )
        # Where the host looks; there is no pinned memory without a GPU, and no need of it.
        is_cuda = device.type == "cuda"
        self.seen = (
            Drawn(*(torch.zeros_like(t, device="cpu").pin_memory() for t in self.drawn)) if is_cuda else self.drawn
        )
        self.mark = torch.cuda.Event() if is_cuda else None  # behind the last window

    def wait(self) -> None:
        """Wait for the last window: then the host may read what was drawn, and write what the next one is given."""
        if self.mark is not None:
            self.mark.synchronize()


class Window:
    """Up to ``num_steps`` steps in a row, each a forward pass and a draw; on CUDA a captured graph that is replayed."""

    def __init__(self, view: ModelView, recorder: Recorder, tags: StageTags, num_steps: int) -> None:
        self.view, self.tags, self.num_steps = view, tags, num_steps
        self.eos_token_ids = torch.full((MAX_EOS_TOKEN_IDS,), -2, device=view.device)
        self._eos_token_ids = frozenset[int]()
        self.num_tags = len(tags.tags)
        as_compiled = view.compiled.compile if view.compiled is not None else lambda function: function
        self._begin, self._end = as_compiled(_begin_step), as_compiled(_end_step)
        self._steps = np.arange(num_steps)
        self.captured = CapturedSteps[StepBuffers](view.device, recorder)

    def follow(self, eos_token_ids: frozenset[int]) -> None:
        """End branches with these tokens. Captured graphs read them where they stand."""
        if eos_token_ids == self._eos_token_ids:
            return
        ids = sorted(eos_token_ids) + [-2] * (MAX_EOS_TOKEN_IDS - len(eos_token_ids))
        self.eos_token_ids.copy_(torch.tensor(ids))
        self._eos_token_ids = eos_token_ids

    def run(self, slots: list[Slot], counts: list[int], slot_mapping: torch.Tensor, pool: PagePool) -> list[Run]:
        """Let each branch grow by up to ``counts[i]`` tokens, until it finishes: what was drawn for each.

        Args:
            slot_mapping: int64 [sum(counts)], where the keys and values of each branch's tokens go.
            pool: has pages for them.

        Raises:
            CanaryError: if the canary is on and one of the steps has read a wrong word.
        """
        at = self._launch(slots, counts, slot_mapping, pool)
        at.wait()
        runs = Drawn(*(part[: max(counts), :, : len(slots)] for part in at.seen)).runs()
        if self.view.canary is not None and at.trail is not None:
            reads = [
                read._replace(new=read.branch.tokens[-1:] + run.tokens[: run.drawn][:-1])
                for read, run in zip(_reads([slot.branch for slot in slots]), runs)
            ]
            self.view.canary.look(reads, at.page_table, at.trail)
        return runs

    @torch.inference_mode()
    def _launch(self, slots: list[Slot], counts: list[int], slot_mapping: torch.Tensor, pool: PagePool) -> StepBuffers:
        n, branches = len(slots), [slot.branch for slot in slots]
        lengths = [branch.length for branch in branches]
        with torch.cuda.device_of(self.view.kv_cache):
            image_group, image_bounds = self.view.images.layout([branch.image for branch in branches])
            prefix_group, prefix_lens = shared_prefixes(branches)
            pages = -(-(max(map(add, lengths, counts)) - 1) // pool.page_size)  # the last token drawn gets no slot
            is_blind = bool(self.view.cross_layers) and -1 in image_group
            shape = Shape.with_room(n, pages, len(image_bounds) - 1, len(prefix_lens), is_blind)
            to, step = self._open(shape)
            to.wait()
            host, seqs = to.inputs.arrays, [branch.seq for branch in branches]
            if to.seqs != seqs:
                self._put_parameters(host, slots)
                to.seqs = seqs
            host["token"][:n] = [branch.tokens[-1] for branch in branches]
            host["position"][:n] = lengths
            host["tag_state"][:n] = [branch.tag_state for branch in branches]
            host["left"][:n] = counts
            host["left"][n:] = 0
            # As the pool has them: those of one branch after those of another.
            host["slot_mapping"].T[:n][self._steps < np.array(counts)[:, None]] = slot_mapping.numpy()
            pool.page_table(seqs, out=to.inputs.host_tensors["page_table"][:n])
            host["prefix_group"][:n] = prefix_group
            host["prefix_lens"][: len(prefix_lens)] = prefix_lens
            host["image_group"][:n] = image_group
            host["image_cu_seqlens"][: len(image_bounds)] = image_bounds
            host["image_cu_seqlens"][len(image_bounds) :] = image_bounds[-1]
            host["step"][:] = 0
            to.inputs.upload()
            if self.view.canary is not None and to.trail is not None:
                to.trail.words[:n] = self.view.canary.trail(_reads(branches)).words
                to.trail.is_broken.zero_()
            for _ in range(max(counts)):
                step()
            if to.mark is not None:
                for seen, drawn in zip(to.seen, to.drawn):
                    seen.copy_(drawn, non_blocking=True)
                to.mark.record()
        return to

    def _put_parameters(self, host: dict[str, np.ndarray], slots: list[Slot]) -> None:
        """Write what the rows of ``slots`` are given in every window."""
        n, params = len(slots), [slot.request.params for slot in slots]
        host["temperature"][:n] = [each.temperature for each in params]
        host["top_k"][:n] = [each.top_k for each in params]
        host["top_p"][:n] = [each.top_p for each in params]
        host["min_p"][:n] = [each.min_p for each in params]
        host["seed"][:n] = [slot.branch.seed for slot in slots]
        host["offset"][:n] = [slot.branch.position_offset for slot in slots]
        host["ends"][:n] = [self._ends(slot) for slot in slots]

    def _open(self, shape: Shape) -> tuple[StepBuffers, Step]:
        """Buffers of this shape, whose rows are all idle or stale, and what runs a step on them."""
        return self.captured.get(
            shape,
            lambda: StepBuffers(
                shape, self.num_steps, self.num_tags, self.view.device, has_trail=self.view.canary is not None
            ),
            self.step,
        )

    def _ends(self, slot: Slot) -> list[bool]:
        """Which tags finish it."""
        stops, trims = slot.request.stops, slot.request.trims
        return [stops is None or tag in stops or tag in trims for tag in range(self.num_tags)] + [False]

    def step(self, at: StepBuffers) -> None:
        """One forward pass and one draw, from these buffers into them; the host is neither asked nor waited for."""
        slot_mapping, position, seq_lens, prefix_group, image_group, row = self._begin(at)
        batch = Batch(
            slot_mapping=slot_mapping,
            page_table=at.page_table,
            seq_lens=seq_lens,
            cu_seqlens_q=at.cu_seqlens_q,
            prefix_group=prefix_group if len(at.prefix_lens) else None,
            prefix_lens=at.prefix_lens if len(at.prefix_lens) else None,
            image_group=image_group if self.view.cross_layers else None,
            image_cu_seqlens=at.image_cu_seqlens if self.view.cross_layers else None,
            has_blind_rows=at.has_blind_rows,
            trail=at.trail,
        )
        logits = self.view.decode(at.token, position, batch)
        self._end(at, logits, row, self.tags, self.eos_token_ids)


def _begin_step(at: StepBuffers) -> tuple[torch.Tensor, ...]:
    """Where the rows of a step write, their rotary positions and lengths, what they share, and what they draw from."""
    alive, length = at.left > 0, at.candidates.position  # its last token included
    return (
        torch.where(alive, at.slot_mapping.index_select(0, at.step)[0], -1),
        length + at.offset - 1,
        torch.where(alive, length, 0).int(),
        torch.where(alive, at.prefix_group, -1),
        torch.where(alive, at.image_group, -1),
        torch.where(alive, at.candidates.row, -1),
    )


def _end_step(
    at: StepBuffers, logits: torch.Tensor, row: torch.Tensor, tags: StageTags, eos_token_ids: torch.Tensor
) -> None:
    """Draw from the logits of ``row``, note what was drawn, and prepare the next step."""
    drawn = draw(logits, at.candidates._replace(row=row), tags)
    for buffer, new in zip(at.drawn, drawn):
        buffer.index_copy_(0, at.step, new.unsqueeze(0))
    token, tag_state, tag, _ = drawn.integers
    ended = (token.unsqueeze(1) == eos_token_ids).any(1)
    no_tag = at.ends.shape[1] - 1
    ended |= at.ends.gather(1, torch.where(tag < 0, no_tag, tag).unsqueeze(1)).squeeze(1)
    at.left.copy_(torch.where(ended | (token < 0), 0, at.left - 1))
    at.token.copy_(token.clamp(min=0))
    at.candidates.tag_state.copy_(tag_state)
    torch._foreach_add_([at.candidates.position, at.step], 1)


def _reads(branches: list[Branch]) -> list[Read]:
    """Branches whose last token has not been computed."""
    return [Read(branch, branch.length - 1) for branch in branches]
