"""One rank of an evaluation, started by the DeepSpeed launcher."""

import argparse
from pathlib import Path

from jointfuse.config import TrainSettings, load_config
from jointfuse.ranks import join, rank_main


def main() -> None:
    parser = argparse.ArgumentParser(prog="jointfuse.evaluate", description="One rank of an evaluation.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--split", default="test")
    parser.add_argument("--corpus", help="another corpus with the same labels")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", help="settings, as section.key=value")
    chosen = parser.parse_intermixed_args()

    def work() -> bool:
        settings = chosen.run / "config.yaml"  # may be gone; what is needed lies in RUN/best
        train = load_config(str(settings)).train if settings.exists() else TrainSettings(epochs=1)
        join(train.longest_step)
        from jointfuse.evaluate.run import evaluate_run, print_evaluation
        from jointfuse.losses.gather import group_rank

        evaluation = evaluate_run(chosen.run, chosen.split, chosen.corpus, chosen.overrides)
        if group_rank() == 0:
            print_evaluation(evaluation)
        return True

    rank_main(work)


if __name__ == "__main__":
    main()
