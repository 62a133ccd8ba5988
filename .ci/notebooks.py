"""Run notebooks, each in a process of its own, forked from this one, where heavy packages are imported already (not
fastai, which patches tensors): that saves four seconds of processor time a notebook. The slowest come first, so that
none of them is waited for. A failing cell is named by its number; what a notebook took is printed. What it leaves in
its temporary folder, photographs and models, is removed."""
import argparse, gc, os, resource, shutil, socket, sys, tempfile, time
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
os.environ['OMP_NUM_THREADS'] = '1' # threads do not survive a fork, and would be in each other's way
try: socket.create_connection(('huggingface.co', 443), 5).close()
except OSError: os.environ.setdefault('HF_HUB_OFFLINE', '1') # else who asks for weights tries for minutes, each time
import fvcore.nn, matplotlib.pyplot, pandas, scipy.stats, sklearn.datasets, sklearn.metrics, timm # noqa: F401 (for the forks)
import nbdev.test
from execnb.shell import CaptureShell
from nbdev.config import get_config

root = Path(__file__).resolve().parent.parent
slowest = ('22_learner','13_methods','06_pruning','29_resume','16_anatomy','11_measure','30_experiments',
           '19_callbacks') # come first; a name that is gone does no harm
nbdev.test.CaptureShell = partial(CaptureShell, mpl_format='png') # figures are drawn, in a quarter of the pixels

def run(f, skipped, tmp):
    "Exits with 0 if every cell ran; else the traceback names the cell"
    start = time.time()
    os.environ['TMPDIR'] = tempfile.tempdir = tmp
    passed,_ = nbdev.test.test_nb(f, skip_flags=skipped, basepath=root)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"{'passed' if passed else 'FAILED'} {os.path.relpath(f, root)}: {time.time()-start:.0f} s, "
          f'{sum(u.ru_utime+u.ru_stime for u in used):.0f} s of a processor, '
          f'{max(u.ru_maxrss for u in used)/2**20:.1f} GB', flush=True) # on Linux counted in KiB
    sys.exit(not passed)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all')
    parser.add_argument('--jobs', type=int, default=2, help='notebooks at a time')
    parser.add_argument('--flags', default='', help='of cells that are left out otherwise, as in "slow cuda"')
    args = parser.parse_args()
    found = [f.resolve() for f in args.notebooks] or [f for f in sorted((root/'nbs').rglob('*.ipynb'))
                                                      if '.ipynb_checkpoints' not in f.parts]
    found.sort(key=lambda f: slowest.index(f.stem) if f.stem in slowest else len(slowest))
    os.chdir(root)
    skipped = set(get_config().tst_flags.split())-set(args.flags.split())
    gc.collect()
    gc.freeze() # what is imported is not searched for garbage again and again, in every notebook
    fork,running,failed = get_context('fork'),{},[]
    while found or running:
        while found and len(running)<args.jobs:
            tmp = tempfile.mkdtemp()
            p = fork.Process(target=run, args=(found[0], skipped, tmp))
            p.start()
            running[p.sentinel] = p,found.pop(0),tmp
        for s in wait(list(running)):
            p,f,tmp = running.pop(s)
            p.join()
            shutil.rmtree(tmp, ignore_errors=True)
            name = os.path.relpath(f, root)
            if p.exitcode: failed.append(name if p.exitcode==1 else f'{name} ended with {p.exitcode}')
    if failed: raise SystemExit(f"Failed, {len(failed)}: {', '.join(failed)}")

if __name__=='__main__': main()
