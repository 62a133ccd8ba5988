"A training that goes wrong says so, and spoils nothing: divergence, wrong settings, two at once, foreign checkpoints."
import errno, io, json, math, os, random, subprocess, sys, tempfile, time, zlib
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.all import DataLoaders
from PIL import Image
from safetensors.torch import load_file
from timm.models import VisionTransformer
from attn_diversity.learner import load_vit, prune_learner
from attn_diversity.resume import claimed, fit_saved, saved_checkpoints
from conftest import say

env = {**os.environ, 'OMP_NUM_THREADS': '1'}

def toy_dls(n=32, valid=16, bs=8):
    "Random images of two classes"
    torch.manual_seed(0)
    items = [(torch.randn(3,16,16)+i%2, i%2) for i in range(n)]
    dls = DataLoaders.from_dsets(items, items[:valid], bs=bs, device='cpu',
                                 num_workers=0) # the tests with threads must not fork
    dls.c = 2
    dls.train.rng.seed(0) # of the order
    return dls

def learner(dls=None, **kw):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=2)
    return prune_learner(toy_dls() if dls is None else dls, vit, **{'keep_rate': .5, 'lr': 1e-3, **kw})

def fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return fit_saved(learn, *args, **kw)

def named(learn): # a model that load_vit can make
    learn.recipe.update(arch='vit_tiny_patch16_224', arch_args=dict(patch_size=4, embed_dim=24, depth=4, num_heads=3))
    return learn

class At(Callback):
    "Does something to the learner at an event of an epoch"
    order = 49 # before the Recorder
    def __init__(self, event, epoch, do): self.event,self.epoch_,self.do = event,epoch,do
    def __call__(self, event):
        if event==self.event and self.epoch_ in (None, self.learn.epoch): self.do(self.learn)

def spoil(value):
    def do(learn): learn.model.head.weight.data.fill_(value)
    return do
def lose(learn): learn.loss = torch.tensor(math.nan)

@pytest.mark.parametrize('event,do,said,ema', [
    ('before_validate', spoil(math.nan), 'its validation loss is nan', None),
    ('before_validate', spoil(math.inf), 'its validation loss is', .5),
    ('before_train', spoil(math.nan), 'its training loss is nan', .5),
    ('after_loss', lose, 'loss is nan', None)])
def test_a_diverged_epoch_is_not_the_best(tmp_path, event, do, said, ema):
    with pytest.raises(RuntimeError) as e: fit(named(learner(ema=ema)), 3, tmp_path, cbs=[At(event, 1, do)])
    for part in (said, 'Training diverged in epoch 1', 'a lower lr (it was 0.001)',
                 f"epoch before, 0, is kept in {tmp_path/'best'}"): assert part in str(e.value)
    best = load_vit(tmp_path/'best')
    assert best.recipe['info']['epoch']==0
    assert all(t.isfinite().all() for t in best.state_dict().values())
    assert [(n,b) for n,b,*_ in saved_checkpoints(tmp_path/'checkpoints')]==[(1,0)]
    history = pd.read_csv(tmp_path/'history.csv')
    assert len(history)==1 and np.isfinite(history[['train_loss','valid_loss']]).all(axis=None)
    if ema is None: return
    # the cause gone, the same training goes on from the good epoch, as if it had never been there
    result = fit(named(learner(ema=ema)), 3, tmp_path, resume=True)
    whole = fit(named(learner(ema=ema)), 3, tmp_path/'whole')
    assert all(result[k]==whole[k] for k in ('train_loss','valid_loss','best_epoch'))

def test_a_first_epoch_that_diverges_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match='No epoch was good, and none is saved'):
        fit(learner(), 2, tmp_path/'run', lr=1e9)
    assert not any((tmp_path/'run').iterdir())

@pytest.mark.parametrize('scores,best', [([.5,math.inf,.6], 2), ([math.inf,.5,.6], 2), ([math.nan,.5,.4], 1),
                                         ([.5,math.nan,.5], 0), ([.5,-math.inf,.4], 0)])
def test_a_metric_that_is_no_number_is_not_the_best(tmp_path, scores, best):
    now = []
    def worth(pred, y): return torch.tensor(scores[now[-1]])
    def note(learn): now.append(learn.epoch)
    result = fit(learner(metrics=worth), 3, tmp_path, cbs=[At('before_epoch', None, note)])
    assert result['best_epoch']==best

def test_an_error_before_the_first_epoch_shows_itself(tmp_path):
    def fail(learn): raise OSError('the mount is lost')
    with pytest.raises(RuntimeError) as e: fit(learner(), 2, tmp_path, cbs=[At('before_fit', None, fail)])
    assert 'Training stopped before epoch 0: OSError' in str(e.value) and 'the mount is lost' in str(e.value)
    assert 'attribute' not in str(e.value)
    fit(learner(), 1, tmp_path/'other')
    learn = learner() # that has been trained before
    fit(learn, 1, tmp_path/'third')
    with pytest.raises(RuntimeError, match='before epoch 0'):
        fit(learn, 2, tmp_path, cbs=[At('before_fit', None, fail)])

@pytest.mark.parametrize('kw', [dict(epochs=0), dict(epochs=1.5), dict(epochs='1'), dict(epochs=True),
    dict(epochs=torch.tensor(1)), dict(lr=-1), dict(lr=math.nan), dict(lr='x'), dict(lr=torch.tensor(1e-3)),
    dict(keep=0), dict(keep=-1), dict(seed=-1), dict(seed='x'), dict(seed=1.5), dict(seed=2**32), dict(seed=None)])
def test_settings_are_checked_before_anything_is_written(tmp_path, kw):
    (name,value), = kw.items()
    with pytest.raises(ValueError, match=f'^{name}=') as e:
        fit(learner(), **{'epochs': 1, 'folder': tmp_path/'run', **kw})
    assert f'{value!r}' in str(e.value)
    assert not any(tmp_path.iterdir())

def test_data_that_cannot_be_trained_on(tmp_path):
    alone = toy_dls()
    alone.loaders = alone.loaders[:1]
    for dls,said in ((toy_dls(valid=0), 'no images to validate with'), (alone, 'no images to validate with')):
        with pytest.raises(ValueError, match=said): fit(learner(dls), 1, tmp_path/'run')
    learn = learner()
    learn.dls = toy_dls(n=6) # of which no batch of 8 can be made
    with pytest.raises(ValueError, match='The 6 training images do not fill a batch of 8'):
        fit(learn, 1, tmp_path/'run')
    assert not any(tmp_path.iterdir())
    (tmp_path/'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file is a file'): fit(learner(), 1, tmp_path/'file')

def strings(state): return {k: 'text' for k in state}
FOREIGN = dict(text=lambda s: 'hello', list=lambda s: [1,2], strings=strings, nothing=lambda s: {},
               unset=lambda s: {**s, 'settings': None},
               unsettled=lambda s: {k: v for k,v in s.items() if k!='settings'},
               stateless=lambda s: {k: v for k,v in s.items() if k!='opt'}, weights=lambda s: s['model'])

@pytest.mark.parametrize('name', FOREIGN)
def test_a_checkpoint_of_something_else_is_named(tmp_path, name):
    fit(learner(), 1, tmp_path)
    (*_,path), = saved_checkpoints(tmp_path/'checkpoints')
    state = torch.load(path, weights_only=True)
    path.unlink()
    buffer = io.BytesIO()
    torch.save(FOREIGN[name](state), buffer)
    foreign = path.with_name(f'epoch-0001-batch-000000.{zlib.crc32(buffer.getbuffer()):08x}.pt')
    foreign.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError) as e: fit(learner(), 1, tmp_path, resume=True)
    assert str(foreign) in str(e.value) and 'it lacks' in str(e.value)
    assert foreign.exists()

def test_a_folder_without_a_checkpoint_begins_anew(tmp_path, capsys):
    (tmp_path/'run'/'checkpoints').mkdir(parents=True)
    assert fit(learner(), 1, tmp_path/'run', resume=True)['epoch']==0
    assert 'nothing to resume' in capsys.readouterr().out

def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch):
    "At each file that gets its name: what was safe stays so, and with room again it goes on to the same end"
    whole,real = fit(named(learner()), 2, tmp_path/'whole'),os.replace
    wanted,folder = load_file(tmp_path/'whole'/'best'/'model.safetensors'),tmp_path/'run'
    for at in range(20):
        left = [at]
        def replace(*args):
            if not left[0]: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return real(*args)
        folder = tmp_path/f'{at} files'
        with monkeypatch.context() as m:
            m.setattr(os, 'replace', replace)
            try: fit(named(learner()), 2, folder)
            except (RuntimeError, OSError) as e: said = str(e)
            else: break
        saved = saved_checkpoints(folder/'checkpoints')
        assert 'No space left on device' in said and ('Safe in' if saved else 'nothing is saved yet') in said
        assert not list((folder/'checkpoints').glob('*.aside'))
        result = fit(named(learner()), 2, folder, resume=True)
        for k in ('train_loss','valid_loss','best_epoch','best_accuracy'): assert result[k]==whole[k]
        best = load_file(folder/'best'/'model.safetensors')
        assert all(torch.equal(best[k], wanted[k]) for k in wanted)
    assert 2<=at<19, at

# two at once

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for name,low in dict(cat=0, dog=120).items():
        (folder/name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(low, low+130, (40,40,3), dtype=np.uint8)).save(folder/name/f'{i}.png')
    return folder

def words(pictures, out, *args):
    small = ['--scratch','--arch','vit_tiny_patch16_224','--img_size','32','--batch_size','8','--n_workers','0']
    return ['attn_diversity_train', pictures, *small, '--out', out, *map(str, args)]

class Command:
    "`attn_diversity_train` in a process of its own; what it says goes to a file, as a pipe that nobody reads fills up"
    def __init__(self, pictures, out, *args):
        self.log = tempfile.TemporaryFile('w+')
        self.p = subprocess.Popen([sys.executable, '-m', 'attn_diversity', 'train', *words(pictures, out, *args)[1:]],
                                  env=env, stdout=self.log, stderr=subprocess.STDOUT)
    def said(self):
        self.p.wait(300)
        self.log.seek(0)
        return self.log.read()
    def until(self, there):
        end = time.monotonic()+300
        while not there():
            assert self.p.poll() is None and time.monotonic()<end, self.log.seek(0) or self.log.read()
            time.sleep(.05)

def test_the_command_that_diverges_fails(tmp_path, pictures):
    r = say(*words(pictures, tmp_path/'run', '--epochs', 2, '--lr', '1e3'))
    assert r.returncode==1 and 'Traceback' not in r.stderr, r.stderr
    assert 'Training diverged in epoch' in r.stderr and '--overwrite' in r.stderr
    assert not list((tmp_path/'run').glob('*.safetensors')) and not list((tmp_path/'run').glob('*.json'))

def test_the_second_of_two_is_refused(tmp_path, pictures):
    out = tmp_path/'run'
    def done(): return max((n for n,*_ in saved_checkpoints(out/'checkpoints')), default=0)
    first = Command(pictures, out, '--epochs', 2000)
    try:
        first.until(done)
        second = say(*words(pictures, out, '--epochs', 2000, '--resume'))
        assert second.returncode==1 and 'Traceback' not in second.stderr, second.stderr
        assert f'Another training is writing to {out}' in second.stderr
        now = done()
        first.until(lambda: done()>now) # undisturbed
    finally: first.p.kill()
    first.said()
    with claimed(out): pass # who was killed holds nothing
    assert not (out/'.training.lock').exists()

@pytest.mark.slow
def test_kills_of_the_command_and_resume(tmp_path, pictures):
    "-9 at random moments, loader processes and all; the same history, weights and best as without"
    epochs,rng = 8,random.Random(0)
    def start(name, *more):
        return Command(pictures, tmp_path/name, '--arch', 'test_vit', '--epochs', epochs, '--lr', '3e-3', *more)
    whole = start('whole')
    whole.until((tmp_path/'whole'/'checkpoints').exists)
    began = time.monotonic()
    whole.said()
    each,kills,done,out = (time.monotonic()-began)/epochs,0,0,tmp_path/'run'
    while kills<6:
        p = start('run', *(['--resume'] if kills else []))
        while not (out/'.training.lock').exists() and p.p.poll() is None: time.sleep(.01)
        time.sleep(rng.uniform(0, 2*each))
        p.p.kill()
        if p.p.wait()==0: break # it was done before
        kills += 1
        saved = max((n for n,*_ in saved_checkpoints(out/'checkpoints')), default=0)
        assert saved>=done # no epoch that was saved is lost
        done = saved
        (out/'.training.lock').unlink(missing_ok=True) # to see the next one take it
    if not (out/'model.json').exists(): start('run', '--resume').said()
    kept = ['epoch','train_loss','valid_loss','accuracy']
    pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path/n/'history.csv')[kept] for n in ('run','whole')))
    for folder in ('.','best'):
        a,b = (load_file(tmp_path/n/folder/'model.safetensors') for n in ('run','whole'))
        assert all(torch.equal(a[k], b[k]) for k in b)
    best = json.loads((out/'best'/'model.json').read_text())['info']['epoch']
    assert best==pd.read_csv(out/'history.csv').accuracy.argmax() and kills>=3

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_ten_processes_race_for_one_folder(tmp_path):
    def until(path):
        end = time.monotonic()+60
        while not path.exists() and time.monotonic()<end: time.sleep(.002)
    def child(): # 0: it had the folder, 3: it was told that another has it
        pid,code = os.fork(),1
        if pid: return pid
        try:
            until(tmp_path/'go')
            with claimed(tmp_path/'run'): until(tmp_path/'end')
            code = 0
        except RuntimeError as e: code = 3 if f"Another training is writing to {tmp_path/'run'}" in str(e) else 1
        finally: os._exit(code)
    running,codes = {child() for _ in range(10)},[]
    (tmp_path/'go').touch()
    while running:
        for pid in list(running):
            ended,status = os.waitpid(pid, os.WNOHANG)
            if not ended: continue
            running.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
        if len(running)==1: (tmp_path/'end').touch() # only the one that has it
        time.sleep(.002)
    assert sorted(codes)==[0]+[3]*9
    assert not (tmp_path/'run'/'.training.lock').exists()

def test_five_threads_one_folder(tmp_path):
    def one(i):
        try: return fit(learner(), 2, tmp_path/'run')['epoch']
        except (RuntimeError, FileExistsError) as e: return str(e)
    with ThreadPoolExecutor(5) as pool: said = list(pool.map(one, range(5)))
    assert said.count(1)==1, said
    others = [s for s in said if s!=1]
    assert all('Another training is writing to' in s or 'holds a run already' in s for s in others), said
    assert [n for n,*_ in saved_checkpoints(tmp_path/'run'/'checkpoints')]==[2,1]
    assert all(t.isfinite().all() for t in load_file(tmp_path/'run'/'best'/'model.safetensors').values())
