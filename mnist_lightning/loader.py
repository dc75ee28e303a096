"""What datamodules of images in memory share: the images, the batches, on any number of processes and after a stop.

N = images, B = batch size, C, H, W = channels, height and width in pixels. A batch is (images, labels): uint8
(B, C, H, W), 0 to 255, and int64 (B,).
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = tuple[Any, Tensor]


class Batched(Dataset):
    """A data set that gives a whole batch for a list of positions."""

    def __len__(self) -> int:
        raise NotImplementedError


class Images(Batched):
    """Images (N, C, H, W) and labels (N,) in memory.

    Attributes:
        stand_in: what a batch holds in the place of the images, indexed as they are; None for the images themselves.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.stand_in: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> Batch:
        """An image and its label; of a list of indices a batch, in a fraction of the time of one after the other."""
        shown = self.images if self.stand_in is None else self.stand_in
        return shown[index], self.labels[index]


class ImagesDataModule(LightningDataModule):
    """Base of datamodules of images: `setup` of a subclass calls super's, and sets train_set, val_set and test_set.

    An epoch that was stopped goes on with exactly the next batch. Evaluation counts each image once, on any number of
    processes.

    Args:
        batch_size: training images a step, on each process.

    Attributes:
        seed: of the order of the training images; by default seed_everything's.
    """

    eval_batch_size = 250  # images; divides 5,000 and 10,000
    augment: float = 0.0  # how much training images are changed at random, anew at each step
    train_set: Images
    val_set: Images
    test_set: Images

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = 0

    def setup(self, stage: str) -> None:
        self.seed = torch.initial_seed() % 2**31

    def train_dataloader(self) -> DataLoader:
        # A DistributedSampler even on one process: its order depends on the seed and the epoch alone.
        sampler: DistributedSampler = DistributedSampler(self.train_set, *self._share(), shuffle=True, seed=self.seed)
        return ResumableLoader(self.train_set, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader | list[Any]:
        return self._eval_dataloader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader(self.test_set)

    predict_dataloader = test_dataloader

    def parts(self) -> dict[str, Images]:
        """The data sets that there are, by their names: of pictures a command reads only those that it needs."""
        return {name: getattr(self, f"{name}_set") for name in ("train", "val", "test") if hasattr(self, f"{name}_set")}

    def use_features(self, part: Literal["train", "val", "test"], features: Any) -> None:
        """From now on the batches of a part hold `features`, indexed as images are, in their place; None ends that."""
        self.parts()[part].stand_in = features

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.seed = state_dict["seed"]

    def _eval_dataloader(self, images: Batched) -> DataLoader:
        # Lightning's default sampler repeats images to give all processes as many; this one is exact.
        sampler = UnrepeatedDistributedSampler(images, *self._share(), shuffle=False)
        return ResumableLoader(images, batch_size=self.eval_batch_size, sampler=sampler)

    def _share(self) -> tuple[int, int]:
        """How many processes there are, and which one this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


class ResumableLoader(DataLoader):
    """A DataLoader that knows its place in the epoch: a run that was killed goes on with the next batch.

    Lightning keeps the state of a training loader that has `state_dict` and `load_state_dict` in its checkpoints. On
    resuming it calls `load_state_dict`, `iter()` and the sampler's `set_epoch`, in that order.
    """

    yielded = 0  # batches of this epoch
    resumed: dict[str, int] | None = None

    @property
    def epoch(self) -> int:
        return self.sampler.epoch if isinstance(self.sampler, DistributedSampler) else 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # This is a generator: it runs when the first batch is asked for, and by then Lightning has set the epoch.
        resumed, self.resumed = self.resumed, None
        self.yielded = resumed["yielded"] if resumed and resumed["epoch"] == self.epoch else 0
        for positions in itertools.islice(self.batch_sampler, self.yielded, None):  # type: ignore[arg-type]
            self.yielded += 1
            if isinstance(self.dataset, Batched):
                yield self.dataset[positions]
            else:  # a subclass of ImagesDataModule has another kind of data set
                yield self.collate_fn([self.dataset[position] for position in positions])
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(self.epoch + 1)  # a plain loop gets another order next time; Lightning sets its own
        self.yielded = 0
