"""StepLoop: Lightning's training loop with less between two batches.

At every step Lightning 2.6 asks each callback for each of its hooks, though nearly all are empty, looks up dozens of
times which stage it is in, reads training_step's signature anew, and makes one closure out of three: 3 % of ConvNet's
epoch on a CPU (docs/results.md), and a good part of a linear head's. Here all of it is looked up once an epoch. The
hooks, their order, the counters and what is logged stay Lightning's: tests/test_loop.py compares them. Whatever isn't
the plain case goes Lightning's own way.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

HOOKS = (  # of a step, in their order
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
# Of a batch, and whether they take the device.
TRANSFER = {"on_before_batch_transfer": False, "transfer_batch_to_device": True, "on_after_batch_transfer": False}


class StepLoop(_TrainingEpochLoop):
    """One process, one device, one optimizer step a batch, and a model that leaves Lightning's own hooks alone."""

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)
        self.plain = isinstance(data_fetcher, _PrefetchDataFetcher) and is_plain(self.trainer)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._hooks = {
            name: [getattr(callback, name) for callback in callbacks if is_overridden(name, callback, Callback)]
            for name in HOOKS
        }
        precision, device = self.trainer.precision_plugin, self.trainer.strategy.root_device
        self._context: Any = nullcontext if type(precision) is Precision else precision.train_step_context
        owner = self.trainer._data_connector._datahook_selector.get_instance  # type: ignore[union-attr]
        self._transfer = [
            (getattr(owner(name), name), (device, 0) if moves else (0,))
            for name, moves in TRANSFER.items()
            if is_overridden(name, owner(name)) or (moves and device.type != "cpu")
        ]

    def advance(self, data_fetcher: Any) -> None:
        if self.restarting or not self.plain:
            super().advance(data_fetcher)
            return
        trainer, progress, connector = self.trainer, self.batch_progress, self.trainer._logger_connector
        batch, _, _ = next(data_fetcher)
        batch_idx = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        for hook, args in self._transfer:
            batch = hook(batch, *args)
        progress.increment_ready()
        connector.on_batch_start(batch)
        if not (first := connector._first_loop_iter):
            connector._current_fx = None  # self.log() puts a name here
        self._call("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        outputs = self._optimize(batch, batch_idx)
        progress.increment_processed()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self._call("on_train_batch_end", outputs, batch, batch_idx)
        if first or connector._current_fx is not None:  # else there is nothing new to collect
            connector.on_batch_end()
        progress.increment_completed()
        if connector.should_update_logs or trainer.fast_dev_run:  # type: ignore[attr-defined]
            connector.update_train_step_metrics()

    def _optimize(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One step of the optimizer; returns what training_step did."""
        model, optimizer = self.trainer.lightning_module, self.trainer.optimizers[0]
        progress = self.automatic_optimization.optim_progress.optimizer
        outputs: dict[str, Any] = {}

        def closure() -> Any:
            with self._context():
                model._current_fx_name = "training_step"
                output = model.training_step(batch, batch_idx)
                model._current_fx_name = None
            outputs.update(output if isinstance(output, Mapping) else {"loss": output})
            loss = outputs["loss"]
            progress.zero_grad.increment_ready()
            self._call("on_before_zero_grad", optimizer)
            progress.zero_grad.increment_started()
            optimizer.zero_grad()
            progress.zero_grad.increment_completed()
            if loss is not None:
                self._call("on_before_backward", loss)
                loss.backward()
                self._call("on_after_backward")
                outputs["loss"] = loss.detach()
            self._call("on_before_optimizer_step", optimizer)
            return outputs["loss"]

        progress.step.increment_ready()
        optimizer.step(closure)
        progress.step.increment_completed()
        return outputs if outputs["loss"] is not None else {}

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Between two batches there is nothing to do, unless a validation or a stop is due."""
        trainer = self.trainer
        due = self.batch_progress.is_last_batch or trainer.should_stop or trainer.received_sigterm
        if due or not self.plain or self.batch_progress.current.ready % trainer.val_check_batch == 0:  # type: ignore
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1

    def _call(self, name: str, *args: Any) -> None:
        if not (hooks := self._hooks[name]):
            return
        trainer, model = self.trainer, self.trainer.lightning_module
        model._current_fx_name = name  # self.log() asks where it is called from
        for hook in hooks:
            hook(trainer, model, *args)
        model._current_fx_name = None


def is_plain(trainer: Any) -> bool:
    """Whether a step of this fit is no more than what `StepLoop.advance` does."""
    model, precision = trainer.lightning_module, trainer.precision_plugin
    own_hooks = (*HOOKS, "backward", "optimizer_zero_grad", "optimizer_step", "configure_gradient_clipping")
    return (
        type(trainer.strategy) is SingleDeviceStrategy
        and type(precision) in (Precision, MixedPrecision)
        and getattr(precision, "scaler", None) is None
        and isinstance(trainer.profiler, PassThroughProfiler)
        and model.automatic_optimization
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and isinstance(trainer.val_check_batch, int)
        and trainer.check_val_every_n_epoch is not None
        and not any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        and not any(is_overridden(name, model) for name in own_hooks)
    )
