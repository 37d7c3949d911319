"""One rank of a training run, started by the DeepSpeed launcher (or alone, as a world of one):

deepspeed --num_gpus 2 --module jointfuse.train --recipe demo --run runs/demo data.corpus=corpora/demo
"""

import argparse
import os
from pathlib import Path

from jointfuse.config import load_config
from jointfuse.interruption import listen
from jointfuse.ranks import join, rank_main
from jointfuse.train.hold import Hold


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="jointfuse.train", description="One rank of a training run.")
    parser.add_argument("--recipe", required=True, help="a recipe by name, or a path to a .yaml file")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the run's latest checkpoint")
    parser.add_argument("--brief", action="store_true", help="do not print the resolved settings")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="settings, as section.key=value")
    chosen = parser.parse_intermixed_args(arguments)

    asked = listen()

    def work() -> bool:
        config = load_config(chosen.recipe, chosen.overrides)
        join(config.train.longest_step)
        hold = Hold(chosen.run)  # until this process ends
        if chosen.resume and os.environ["RANK"] == "0":
            hold.take()  # before its checkpoints are looked at
        from jointfuse.train.loop import Trainer

        trainer = Trainer(config, chosen.run, chosen.resume, asked, hold)
        if not chosen.brief and trainer.rank == 0:
            print(config.to_yaml(), flush=True)
        return trainer.train()

    rank_main(work)


if __name__ == "__main__":
    main()
