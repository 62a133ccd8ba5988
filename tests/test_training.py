"What training in several processes, and processes that are killed, must not change."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file

here = os.path.dirname(sys.executable)
small = ['digits','--arch','vit_tiny_patch16_224','--scratch','--img_size','32','--batch_size','32','--lr','1e-3','--n_workers','0','--indicator','medad','--keep_rate','0.5']
env = {**os.environ, 'OMP_NUM_THREADS': '1'}

def train(out, *args, launch=(), **kw):
    return subprocess.Popen([*(launch or [sys.executable]), '-m', 'attn_diversity', 'train', *small, '--out', str(out), *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

def finish(p):
    said = p.communicate(timeout=600)[0]
    assert p.returncode==0, said
    return said

def history(out): return pd.read_csv(out/'history.csv')[['epoch','train_loss','valid_loss','accuracy']]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Three epochs in one go, in one process"
    out = tmp_path_factory.mktemp('whole')/'run'
    finish(train(out, '--epochs', 3))
    return out

def test_two_processes_have_the_loss_curve_of_one(whole, tmp_path):
    said = finish(train(tmp_path/'run', '--epochs', 3, launch=[f'{here}/accelerate','launch','--cpu','--num_processes','2','--num_machines','1','--mixed_precision','no','--dynamo_backend','no']))
    assert said.count('photographs to train on')==1 # one of them speaks
    one,two = history(whole),history(tmp_path/'run')
    made = [json.loads((f/'model.json').read_text())['info'] for f in (whole, tmp_path/'run')]
    assert [m['processes'] for m in made]==[1, 2] and made[0]['batch_size']==made[1]['batch_size']==32
    np.testing.assert_allclose(two.train_loss, one.train_loss, rtol=1e-4) # augmentation is off in `small`'s twin below; the digits' turns are drawn by process 0's seed for its own share
    np.testing.assert_allclose(two.valid_loss, one.valid_loss, rtol=1e-3)

def test_kill_in_the_middle_of_an_epoch_then_resume(whole, tmp_path):
    out = tmp_path/'run'
    p = train(out, '--epochs', 3)
    while not list(out.glob('checkpoints/epoch-0001-*.pt')): # the first epoch is saved
        assert p.poll() is None, p.communicate()[0]
        time.sleep(.02)
    time.sleep(.5)
    p.kill() # -9
    p.communicate()
    assert not (out/'model.json').exists()
    refused = train(out, '--epochs', 3)
    assert '--resume' in refused.communicate()[0] and refused.returncode==1
    said = finish(train(out, '--epochs', 3, '--resume'))
    assert 'Going on in' in said
    pd.testing.assert_frame_equal(history(out), history(whole)) # bit by bit
    for a,b in zip(load_file(out/'model.safetensors').values(), load_file(whole/'model.safetensors').values()): assert torch.equal(a, b)

def test_sigterm_saves_before_it_leaves(whole, tmp_path):
    out = tmp_path/'run'
    p = train(out, '--epochs', 3)
    while not list(out.glob('checkpoints/epoch-0001-*.pt')): time.sleep(.02)
    time.sleep(.3)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[0]
    assert p.returncode==128+signal.SIGTERM and 'Stopped' in said and '--resume' in said
    finish(train(out, '--epochs', 3, '--resume'))
    pd.testing.assert_frame_equal(history(out), history(whole))
