import time, traceback
from pathlib import Path
from training_fixtures import train, trainer
def work(recipe, folder, names):
    out={}
    for n in names:
        t=time.time()
        try:
            with trainer(recipe, folder/n, f"train.deepspeed={n}", "train.steps=6") as m:
                print(type(m.engine.optimizer), flush=True)
                m.train()
            out[n]=[r for r in open(folder/n/"metrics.jsonl")] if m.rank==0 else None
        except Exception as e:
            traceback.print_exc()
            out[n]=repr(e)
        print("TIME", n, time.time()-t, flush=True)
    return out
