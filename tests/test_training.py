"What training in several processes, and processes that are killed, must not change."
import json, os, runpy, signal, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from conftest import say

env = {**os.environ, 'OMP_NUM_THREADS': '1'}
tool = lambda name: str(Path(sys.executable).with_name(name))
torchrun = [tool('torchrun'), '--nproc_per_node','2']
# without a GPU the processes talk by gloo
accelerate = [tool('accelerate'), 'launch','--multi_gpu','--num_processes','2','--num_machines','1',
              '--mixed_precision','no','--dynamo_backend','no']
small = ['digits','--arch','test_vit','--scratch','--img_size','32','--batch_size','32',
         '--lr','1e-3','--n_workers','0','--indicator','medad','--keep_rate','0.5']

def start(*args):
    return subprocess.Popen([str(a) for a in args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)
def train(out, *args): return start(sys.executable, '-m', 'attn_diversity', 'train', *small, '--out', out, *args)
def train_here(out, *args): # in this process, with as many threads as there: rounding depends on them
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return say('attn_diversity_train', *small, '--out', out, *args)
    finally: torch.set_num_threads(threads)

def finish(p):
    said = p.communicate(timeout=600)[0]
    assert p.returncode==0, said
    return said

def until_saved(p, out, epoch):
    while not list(out.glob(f'checkpoints/epoch-{epoch:04d}-*.pt')):
        assert p.poll() is None, p.communicate()[0]
        time.sleep(.02)

def history(out): return pd.read_csv(out/'history.csv')[['epoch','train_loss','valid_loss','accuracy']]
def weights(out): return load_file(out/'model.safetensors').values()
def same_weights(a, b): return all(torch.equal(x, y) for x,y in zip(weights(a), weights(b), strict=True))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Three epochs in one go, in one process: this one"
    out = tmp_path_factory.mktemp('whole')/'run'
    r = train_here(out, '--epochs', 3)
    assert r.returncode==0, r.stderr
    return out

def test_two_processes_have_the_loss_curve_of_one(tmp_path, monkeypatch):
    """Without random augmentation, of which each process draws its own: same batches, same losses, same weights.
    With scores that do not depend on the weights: where two patches have nearly the same score, the least
    difference in rounding turns their order, and then it is no longer small. (Variance begins to differ in the
    13th batch of this very training.)"""
    script = tmp_path/'fit.py'
    script.write_text(textwrap.dedent('''
        import sys, torch
        from fastai.torch_core import num_distrib, rank_distrib, set_seed
        from attn_diversity.distributed import join_processes
        join_processes()
        open(f'{sys.argv[1]}.{rank_distrib()}-of-{num_distrib()}', 'w')
        from fastai.callback.core import Callback
        from attn_diversity.callbacks import ThroughputCallback
        from attn_diversity.data import digits_dls
        from attn_diversity.learner import prune_learner, save_vit
        from attn_diversity.resume import fit_saved
        set_seed(0)
        # 359 validation digits: the last batch of 29 is no equal share
        dls = digits_dls(32, batch_size=30, augment=False)
        dls.train.n = 480
        def place(a): return torch.arange(a.shape[-1], dtype=torch.float32).expand(len(a), -1)
        learn = prune_learner(dls, 'vit_tiny_patch16_224', place, .5, fuse=False, pretrained=False, lr=1e-3,
                              patch_size=8, embed_dim=48, depth=4, num_heads=3)
        learn.model.double()
        class Double(Callback):
            order = 15
            def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
        set_seed(0)
        with learn.no_bar(), learn.no_logging(): fit_saved(learn, 2, sys.argv[1], cbs=[Double(), ThroughputCallback()])
        if not rank_distrib(): save_vit(learn, sys.argv[1])
    '''))
    monkeypatch.setattr(sys, 'argv', [str(script), str(tmp_path/'one')])
    runpy.run_path(str(script))
    finish(start(*torchrun, script, tmp_path/'two'))
    assert {f.name for f in tmp_path.glob('two.*')}=={'two.0-of-2','two.1-of-2'}
    one,two = history(tmp_path/'one'),history(tmp_path/'two')
    np.testing.assert_allclose(two, one, rtol=1e-6) # what the columns, in float32, can tell
    for a,b in zip(weights(tmp_path/'one'), weights(tmp_path/'two'), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    speed = [pd.read_csv(tmp_path/n/'history.csv') for n in ('one','two')]
    for s in speed: # images of all processes, over the seconds of the epoch: an upper bound of either clock
        assert (s['img/s']*s.seconds >= 480*.5).all(), s

def test_the_command_in_two_processes(tmp_path):
    said = finish(start(*accelerate, '-m', 'attn_diversity', 'train', *small, '--out', tmp_path/'run', '--epochs', 1,
                        '--batch_size', 128))
    assert said.count('photographs to train on')==1 and said.count('accuracy 0.')==1 # one of them speaks
    info = json.loads((tmp_path/'run'/'model.json').read_text())['info']
    assert info['processes']==2 and info['batch_size']==128

@pytest.mark.slow # the sentence itself is seen in notebook 28
def test_an_odd_batch_is_refused_by_the_command_in_two_processes(tmp_path):
    p = start(*accelerate, '-m', 'attn_diversity', 'train', *small, '--out', tmp_path/'odd', '--epochs', 1,
              '--batch_size', 33)
    said = p.communicate()[0]
    assert 'cannot be shared equally by 2 processes' in said

def test_kill_in_the_middle_of_an_epoch_then_resume(whole, tmp_path):
    out = tmp_path/'run'
    p = train(out, '--epochs', 3)
    until_saved(p, out, 1)
    time.sleep(.5)
    p.kill() # -9
    p.communicate()
    assert not (out/'model.json').exists()
    refused = train_here(out, '--epochs', 3)
    assert '--resume' in refused.stderr and refused.returncode==1
    resumed = train_here(out, '--epochs', 3, '--resume')
    assert resumed.returncode==0 and 'Going on in' in resumed.stdout, resumed.stderr
    pd.testing.assert_frame_equal(history(out), history(whole)) # bit by bit
    assert same_weights(out, whole)

def test_sigterm_saves_before_it_leaves(whole, tmp_path):
    out = tmp_path/'run'
    p = train(out, '--epochs', 3)
    until_saved(p, out, 1)
    time.sleep(.3)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[0]
    assert p.returncode==128+signal.SIGTERM and 'Stopped' in said and '--resume' in said
    resumed = train_here(out, '--epochs', 3, '--resume')
    assert resumed.returncode==0, resumed.stderr
    pd.testing.assert_frame_equal(history(out), history(whole))
    assert same_weights(out, whole)

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_twenty_kills_lose_nothing_but_the_epoch_under_way(tmp_path):
    "Children of one process that has only imported, so that a restart takes a tenth of a second"
    script = tmp_path/'kills.py'
    script.write_text(textwrap.dedent('''
        import os, random, signal, sys, time
        from pathlib import Path
        from fastai.torch_core import set_seed
        from attn_diversity.data import digits_dls
        from attn_diversity.learner import prune_learner, save_vit
        from attn_diversity.resume import saved_checkpoints, fit_saved
        out = Path(sys.argv[1])
        def child(folder, resume):
            pid = os.fork()
            if pid: return pid
            set_seed(0)
            learn = prune_learner(digits_dls(16, batch_size=64), 'vit_tiny_patch16_224', method='evit',
                                  keep_rate=.5, pretrained=False, lr=1e-3, patch_size=4, embed_dim=48,
                                  depth=4, num_heads=3, ema=.9)
            with learn.no_bar(), learn.no_logging(): fit_saved(learn, 12, folder, resume=resume)
            save_vit(learn, folder)
            os._exit(0)
        assert os.waitpid(child(out/'whole', False), 0)[1]==0
        rng,kills,done = random.Random(0),0,0
        while kills<20:
            pid = child(out/'run', True)
            time.sleep(rng.uniform(.05, 1.5))
            os.kill(pid, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(pid, 0)[1]): kills += 1
            saved = max((n for n,*_ in saved_checkpoints(out/'run'/'checkpoints')), default=0)
            assert saved>=done, (saved, done) # no epoch that was saved is ever lost
            done = saved
            print(kills, 'kills,', done, 'epochs')
        assert os.waitpid(child(out/'run', True), 0)[1]==0
    '''))
    said = finish(start(sys.executable, script, tmp_path))
    assert '20 kills' in said
    pd.testing.assert_frame_equal(history(tmp_path/'run'), history(tmp_path/'whole'))
    assert same_weights(tmp_path/'run', tmp_path/'whole')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_two_workers_share_a_sweep(tmp_path):
    """Each run of Table 2 is done once, by one of them. Both are children of a process that has only imported, and
    see every tenth digit; images a second are timed for a moment."""
    script = tmp_path/'workers.py'
    script.write_text(textwrap.dedent('''
        import os, sys
        from attn_diversity import experiments
        from attn_diversity.__main__ import main
        def few(*args, make=experiments.digits_dls, **kw):
            dls = make(*args, **kw)
            for dl in dls.loaders: dl.n //= 10
            return dls
        def moment(models, batch_size, seconds, measure=experiments.throughput): return measure(models, 8, seconds=0)
        experiments.digits_dls,experiments.throughput = few,moment
        children = []
        for name in sys.argv[1:3]:
            pid = os.fork()
            if pid:
                children.append(pid)
                continue
            for stream in (1,2): os.dup2(os.open(name, os.O_CREAT|os.O_WRONLY|os.O_APPEND), stream)
            code = 1
            try:
                main(['attn_diversity_sweep', *sys.argv[3:]])
                code = 0
            except SystemExit as e: print(e.code)
            finally:
                sys.stdout.flush()
                os._exit(code)
        sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in children))
    '''))
    logs = [tmp_path/'a.log',tmp_path/'b.log']
    p = start(sys.executable, script, *logs, '--table',2,'--data','digits','--out',tmp_path/'runs','--epochs',1,
              '--base_epochs',1,'--batch_size',128)
    other = p.communicate(timeout=600)[0]
    said = [f.read_text() for f in logs]
    assert p.returncode==0, (said, other)
    for run in ('variance-0.6-fused','medad-0.6-fused','evit-0.6-fused','tome','base'):
        assert (tmp_path/'runs'/run/'result.json').exists(), said
        assert sum(s.count(f': {run}\n') for s in said)==1 or run=='base', (run, said) # "2 of 4: medad-0.6-fused"
    assert sum(s.count('base: an unpruned ViT') for s in said)==1
    assert all(': ' in s for s in said)
    report = say('attn_diversity_report', '--table', 2, '--out', tmp_path/'runs')
    assert 'variance' in report.stdout and (tmp_path/'runs'/'table-2.html').exists(), report.stderr
