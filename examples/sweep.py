"""A sweep over learning rates with Optuna, chosen by validation accuracy: the test images aren't looked at.

    pip install optuna
    python examples/sweep.py --trials 10 -- --config configs/convnet.yaml --trainer.max_epochs 1

What follows `--` goes to each `fit`. Every trial is a run of its own in lightning_logs/, side by side in TensorBoard's
hparams tab. The study is kept in lightning_logs/sweep.db: run the same command again, and it goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from mnist_lightning.commands.cli import CLI
from mnist_lightning.errors import UserError, report

try:
    import optuna
except ImportError:
    sys.exit(report(UserError("optuna, which the sweep needs", "no such package", "pip install optuna")))


def objective(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    untested = ("--trainer.limit_test_batches", "0")
    try:
        trained = CLI(["fit", *options.fit, *untested, "--model.optimizer.lr", f"{rate:.3g}"]).command
    except UserError as error:
        if "finite numbers" in str(error):  # the rate was too large
            raise optuna.TrialPruned(str(error)) from error
        sys.exit(report(error))
    best = float(trained.best.best_model_score or 0)
    print(f"Validation accuracy {best:.4f} in {trained.run.folder}", flush=True)
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("fit", nargs="*", help="after --: options of `fit`")
    options = parser.parse_args()
    sys.argv[1:] = []
    Path("lightning_logs").mkdir(exist_ok=True)
    storage = "sqlite:///lightning_logs/sweep.db"
    study = optuna.create_study(study_name="lr", storage=storage, load_if_exists=True, direction="maximize")
    study.optimize(objective, n_trials=options.trials)
    print(f"Best of {len(study.trials)}: --model.optimizer.lr {study.best_params['lr']:.3g}, {study.best_value:.4f}")
