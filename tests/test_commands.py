"The commands, as a person types them."
import json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.datasets import load_sample_image
from attn_diversity.__main__ import COMMANDS
from attn_diversity.data import digits_dls
from attn_diversity.learner import load_vit
from conftest import say

shared = Path(__file__).parents[2]/'shared'

def run(*args, **env): # a process of its own, which takes seconds to begin
    command = Path(sys.executable).with_name(args[0])
    return subprocess.run([command, *map(str, args[1:])], capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=900)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two classes of crops of photographs that scikit-learn ships"
    folder,rng = tmp_path_factory.mktemp('photos'),np.random.default_rng(0)
    for name in ('china','flower'):
        a = load_sample_image(f'{name}.jpg')
        (folder/name).mkdir()
        for i in range(12):
            y,x = (int(rng.integers(0, d-100)) for d in a.shape[:2])
            Image.fromarray(a[y:y+100,x:x+100]).save(folder/name/f'{i}.jpg')
    return folder

small = ('--arch','vit_tiny_patch16_224','--scratch','--img_size','48','--batch_size','8','--epochs','1')

def test_train_writes_everything_and_comes_back(photos, tmp_path):
    (photos/'china'/'bad.jpg').write_text('no picture')
    r = run('attn_diversity_train', photos, *small, '--indicator', 'medad', '--keep-rate', '0.5',
            '--out', tmp_path/'run')
    (photos/'china'/'bad.jpg').unlink()
    assert r.returncode==0, r.stderr
    # a log: a line an epoch and its header, no bar; warnings are sentences, and ours only
    assert not re.search('[\r█|]', r.stdout) and len(r.stdout.splitlines())==5
    assert '9 -> 6 -> 4 -> 3 tokens' in r.stdout
    head,row = r.stdout.splitlines()[2:4]
    assert len(re.split('  +', head.strip()))==len(row.split())==9 and row.split()[0]=='0'
    bad = 'china/bad.jpg (in no known format)'
    assert r.stderr==f'Warning: Left out 1 of 25 files, which are no readable images: {bad}\n'
    written = {f.name for f in (tmp_path/'run').iterdir()}
    assert written=={'best','model.safetensors','model.json','history.csv','kept_patches.png'}
    made = json.loads((tmp_path/'run'/'model.json').read_text())
    assert made['classes']==['china','flower'] and made['pruning']['method']=='medad'
    history = pd.read_csv(tmp_path/'run'/'history.csv')
    assert len(history)==1 and history.gflops[0]>0 and history['img/s'][0]>0
    assert load_vit(tmp_path/'run')(torch.zeros(1,3,48,48)).shape==(1,2)
    again = say('attn_diversity_train', photos, *small, '--out', tmp_path/'run')
    assert again.returncode==1 and '(--out), or pass --overwrite to' in again.stderr
    again = say('attn_diversity_train', photos, *small, '--resume', '--out', tmp_path/'run')
    assert again.returncode==1 and f"in another folder (--checkpoint '{tmp_path/'run'}', --out ...)" in again.stderr

@pytest.mark.parametrize('args,said,pruning,drawn', [
    (('--method','tome','--r','1'), '9 -> 8 -> 7 -> 6 -> 5 -> 4', dict(method='tome', r=[1]*12), True),
    (('--method','evit'), '9 -> 8 -> 7 -> 6 tokens, by evit',
     dict(method='evit', keep_rate=[.7]*3, blocks=[3,6,9]), True),
    (('--method','none'), 'all tokens, unpruned', dict(method='none'), False),
], ids=lambda v: v[1] if isinstance(v, tuple) else None)
def test_any_method_with_its_own_settings(args, said, pruning, drawn, photos, tmp_path):
    r = say('attn_diversity_train', photos, *small, *args, '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert said in r.stdout
    assert json.loads((tmp_path/'run'/'model.json').read_text())['pruning']==pruning
    assert (tmp_path/'run'/'kept_patches.png').exists()==drawn # of an unpruned model there is nothing to see

@pytest.mark.parametrize('args,said', [
    (('nowhere',), 'nowhere is not there'),
    (('{photos}','--keep_rate','1.3'), 'attn_diversity_train: --keep_rate 1.3: the share of patches to keep must'),
    (('{photos}','--indicator','varience'), 'take one of mean, variance, medad'),
    (('{photos}','--arch','vit_smal'), "no model 'vit_smal'. Similar: vit_small_patch"),
    (('{photos}','--arch','swin_tiny_patch4_window7_224','--scratch'), 'tokens of this SwinTransformer'),
    (('{photos}','--method','merge'), 'take one of mean, variance, medad, random, evit, tome, fold, dynamicvit, none'),
    (('{photos}','--method','tome','--keep_rate','0.3'), '--keep_rate: ToMe has no such setting, only r'),
    (('{photos}','--r','5'), '--r: variance has no such setting'),
    (('{photos}','--method','none','--keep_rate','0.3'), '--keep_rate: unpruned has no such setting'),
    (('{photos}','--method','tome','--no_fuse'), 'fuse: ToMe has no such setting'),
    (('{photos}','--method','tome','--indicator','nonsense'), "--indicator 'nonsense', --method 'tome': each says"),
    (('{photos}','--method','evit','--compile'), 'Train it without compile'),
    (('{photos}','--img_size','50','--scratch','--arch','vit_tiny_patch16_224'), '50'),
    (('{photos}','--checkpoint','none.safetensors','--img_size','48','--arch','vit_tiny_patch16_224'),
     'none.safetensors is not there'),
    (('{photos}','--keep_rate','much'), "argument --keep_rate: invalid float value: 'much'"),
    (('{photos}','--keeprate','1'), 'unrecognized arguments: --keeprate'),
], ids=lambda v: v[-1] if isinstance(v, tuple) else None)
def test_mistakes_are_answered_in_one_line(args, said, photos, tmp_path):
    r = say('attn_diversity_train', *(a.format(photos=photos) for a in args), '--out', tmp_path/'out')
    assert r.returncode==(2 if 'argument' in said else 1)
    assert said in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'out').exists() # nothing is left behind

def test_without_a_network_the_flags_are_named(photos, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    r = say('attn_diversity_train', photos, *small[:2], *small[3:], '--out', tmp_path/'out') # not from --scratch
    assert r.returncode==1 and 'Traceback' not in r.stderr and not (tmp_path/'out').exists()
    assert '--checkpoint ' in r.stderr and '--scratch' in r.stderr and 'pretrained=' not in r.stderr

def test_help_is_quick_and_begins_with_an_example():
    "It imports nothing that takes its time: neither the overview nor the help of a command"
    code = """if True:
        import sys
        from attn_diversity.__main__ import COMMANDS, main
        for words in [['--help'], ['--version'], *([n,'--help'] for n in COMMANDS), ['train','--version']]:
            try: main(['m', *words])
            except SystemExit as e: assert not e.code
        heavy = {'torch','fastai','timm','pandas','numpy','matplotlib','sklearn','scipy'}
        print(f"heavy: {heavy & {m.split('.')[0] for m in sys.modules}}")"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode==0 and r.stdout.endswith('heavy: set()\n'), r.stderr+r.stdout[-200:]
    for name in COMMANDS:
        program = f'attn_diversity_{name}'
        assert re.search(fr'^usage: {program} .*\[options\]\nexample: {program} ', r.stdout, re.M)
        assert re.search(fr'^  {name} +\w', r.stdout, re.M) # a line in the overview

def test_programs_and_the_module_are_one(tmp_path):
    settings = ConfigParser(delimiters=['='])
    settings.read(Path(__file__).parents[1]/'settings.ini')
    programs = settings['DEFAULT']['console_scripts'].split()
    assert sorted(programs)==sorted(f'attn_diversity_{n}=attn_diversity.__main__:main' for n in COMMANDS)
    def module(*words):
        words = [sys.executable, '-m', 'attn_diversity', *words]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    right = module('--help')
    assert right.returncode==0 and right.stdout.startswith('usage: python -m attn_diversity command')
    wrong = module('foo')
    assert wrong.returncode==1 and "There is no command 'foo'." in wrong.stderr and '\n  train ' in wrong.stderr

@pytest.fixture(scope='module')
def first(photos, tmp_path_factory):
    "A run"
    out = tmp_path_factory.mktemp('runs')/'first'
    r = say('attn_diversity_train', photos, *small, '--method', 'medad', '--keep_rate', '0.5', '--out', out)
    assert r.returncode==0, r.stderr
    return out

def test_a_run_is_trained_on(photos, first, tmp_path):
    on = say('attn_diversity_train', photos, '--checkpoint', first, '--keep_rate', '0.3', '--epochs', '1', '--out',
             tmp_path/'on')
    assert on.returncode==0, on.stderr
    assert 'vit_tiny_patch16_224: 9 -> 4 -> 3 -> 2 tokens, by medad' in on.stdout # at 48 pixels, as the run
    made = json.loads((tmp_path/'on'/'model.json').read_text())
    assert made['pruning']['method']=='medad' and made['pruning']['keep_rate']==[.3]*3 and made['img_size']==48
    assert made['data']==str(photos) and Path(made['checkpoint']).parent==first
    wrong = say('attn_diversity_train', photos, '--checkpoint', first, '--arch', 'deit_small_patch16_224', '--out',
                tmp_path/'no')
    assert wrong.returncode==1 and "--arch 'deit_small_patch16_224' is another" in wrong.stderr
    assert not (tmp_path/'no').exists()

def test_a_run_is_asked_and_measured(photos, first, tmp_path):
    r = say('attn_diversity_predict', first, photos/'china'/'0.jpg', '--form', 'jsonl', photos/'flower', '--show',
            tmp_path/'new'/'kept.png')
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert len(rows)==13 and {x['class'] for x in rows}<={'china','flower'} and not r.stderr
    assert Image.open(tmp_path/'new'/'kept.png').size[0]>300
    r = say('attn_diversity_evaluate', first, photos, '--keep_rates', '1,0.5', '--seconds', '0', '--out', tmp_path/'e')
    assert r.returncode==0 and 'keep rate 0.5' in r.stdout, r.stderr
    t = pd.read_csv(tmp_path/'e'/'accuracy.csv')
    assert list(t.model)==['keep rate 1','keep rate 0.5'] and list(t.photographs)==[24]*2
    matrix = pd.read_csv(tmp_path/'e'/'confusions_keep_rate_0.5.csv', index_col=0)
    assert matrix.to_numpy().sum()==24 and np.trace(matrix)==round(24*t.accuracy[1])
    again = say('attn_diversity_evaluate', first, photos, '--out', tmp_path/'e')
    assert again.returncode==1 and 'already holds accuracy.csv' in again.stderr and '(--out)' in again.stderr
    r = say('attn_diversity_bench', '--arch', first, '--keep_rates', '0.5,0.3', '--batch_sizes', '2', '--seconds', '0',
            '--device', 'cpu', '--out', tmp_path/'b')
    assert r.returncode==0, r.stderr
    t = pd.read_csv(tmp_path/'b'/'bench.csv')
    assert list(t.indicator)==['none','medad','medad'] and list(t['keep rate'])==[1,.5,.3]
    assert t.GFLOPs.is_monotonic_decreasing
    r = say('attn_diversity_bench', '--archs', first, '--img_sizes', '64', '--out', tmp_path/'c')
    assert r.returncode==1 and 'leave out img_sizes' in r.stderr and not (tmp_path/'c').exists()

def test_a_choice_is_a_run(photos, first, tmp_path):
    r = say('attn_diversity_choose', first, photos, '--loss', '100', '--methods', 'variance', '--keep_rates', '0.5',
            '--seconds', '0', '--out', tmp_path/'fast')
    assert r.returncode==0, r.stderr
    t = pd.read_csv(tmp_path/'fast'/'choice.csv')
    assert list(t.method)==['none','medad','variance'] and t.within.all() and 'on 24 photographs' in r.stdout
    fastest = t.iloc[t.gain.argmax()]
    assert (tmp_path/'fast'/'model.json').exists()==(fastest.method!='none')
    if fastest.method!='none': assert load_vit(tmp_path/'fast').recipe['pruning']['method']==fastest.method

def test_which_file_is_to_be_exported(first): # that it is, is seen in the notebook
    none = say('attn_diversity_export', first)
    assert none.returncode==1 and 'Give --onnx, --torch, --int8, or several of them.' in none.stderr

def test_a_sweep_with_a_failed_run_fails(monkeypatch, tmp_path):
    state = pd.DataFrame(dict(run=['a','b','c'], state=['done','failed','failed']))
    monkeypatch.setattr('attn_diversity.commands.run_table', lambda *args, **kw: state)
    monkeypatch.setattr('attn_diversity.commands.report', lambda *args: None)
    r = say('attn_diversity_sweep', '--out', tmp_path)
    assert r.returncode==1 and '1 of 3 runs are done' in r.stdout and '2 runs failed (b, c): error.txt' in r.stderr

def test_demo_in_its_shortest_form(tmp_path, monkeypatch):
    monkeypatch.setattr('attn_diversity.commands.digits_dls', partial(digits_dls, valid_pct=.9))
    r = say('attn_diversity_demo', '--epochs', '1', '--tune_epochs', '1', '--out', tmp_path/'demo')
    assert r.returncode==0, r.stderr
    assert not re.search('[\r█]', r.stdout) and len(r.stdout.splitlines())<=3*3+9 # three epochs, steps and the table
    table = pd.read_csv(tmp_path/'demo'/'results.csv')
    assert list(table.indicator)==['none','variance','medad']
    assert list(table['tokens by stage'])==['36 36 36 36','36 27 20 15','36 27 20 15']
    assert table['seconds an epoch'].gt(0).all() and 'seconds an epoch' in r.stdout
    assert Image.open(tmp_path/'demo'/'kept_patches.png').size[0]>300
    assert say('attn_diversity_demo', '--keep_rate', '0').returncode==1

def test_preparing_says_a_line(photos, tmp_path, monkeypatch):
    monkeypatch.setattr('attn_diversity.prepare.ProcessPoolExecutor', ThreadPoolExecutor)
    r = say('attn_diversity_prepare', photos, tmp_path/'small', '--short-side', '32', '--n_workers', '1')
    assert r.returncode==0 and '\r' not in r.stdout and not r.stderr, r.stderr
    assert r.stdout.startswith('24 images: 24 resized') and len(r.stdout.splitlines())==1
    assert Image.open(tmp_path/'small'/'china'/'0.jpg').size==(32,32)

def test_overlapping_patches(photos, tmp_path):
    r = say('attn_diversity_train', photos, *small, '--stride', '12', '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert '9 -> 8 -> 7 -> 6 tokens' in r.stdout # (48-16)//12 + 1 = 3 a side
    assert json.loads((tmp_path/'run'/'model.json').read_text())['stride']==12
    r = say('attn_diversity_train', photos, *small, '--stride', '17', '--out', tmp_path/'no')
    assert r.returncode==1 and '--stride 17' in r.stderr and not (tmp_path/'no').exists()

def test_bench_tells_gain_and_realised_saving(tmp_path):
    r = say('attn_diversity_bench', '--archs', 'vit_tiny_patch16_224', '--img_sizes', '64,96',
            '--batch_sizes', '2', '--keep_rates', '0.7,0.4', '--indicators', 'variance',
            '--seconds', '0.2', '--device', 'cpu', '--out', tmp_path/'b')
    assert r.returncode==0, r.stderr
    t,about = pd.read_csv(tmp_path/'b'/'bench.csv'),json.loads((tmp_path/'b'/'bench.json').read_text())['about']
    assert len(t)==2*3 and list(t.indicator[:3])==['none','variance','variance']
    for _,g in t.groupby('image size'):
        np.testing.assert_allclose(g['realised saving'], g.gain*g.GFLOPs/g.GFLOPs.iloc[0])
    assert about['precision']=='float32' and 'cpu' in about['device'] and about['timm']
    assert Image.open(tmp_path/'b'/'bench.png').size[0]>500
    again = say('attn_diversity_bench', '--out', tmp_path/'b')
    assert again.returncode==1 and '--overwrite' in again.stderr and 'Traceback' not in again.stderr
    wrong = say('attn_diversity_bench', '--archs', 'deit_smal', '--out', tmp_path/'c')
    assert "timm has no model 'deit_smal'. Similar: deit_small_" in wrong.stderr
    wrong = say('attn_diversity_bench', '--keep_rates', '1.3', '--out', tmp_path/'c')
    assert wrong.returncode==1 and '(0, 1]' in wrong.stderr and not (tmp_path/'c').exists()

@pytest.mark.skipif(not (shared/'data'/'flowers').is_dir(), reason='../shared/data/flowers is missing')
def test_trained_vit_on_real_photographs(tmp_path):
    "The saliency ViT at another image size, on one of 64 flowers"
    for d in (shared/'data'/'flowers').iterdir():
        (tmp_path/'f'/d.name).mkdir(parents=True)
        for f in sorted(d.iterdir())[::64]: shutil.copy(f, tmp_path/'f'/d.name)
    r = say('attn_diversity_train', tmp_path/'f', '--arch', 'vit_small_patch14_dinov2',
            '--checkpoint', shared/'models'/'vit_small_patch14_saliency.safetensors',
            '--img_size', '112', '--epochs', '1', '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert 'not in the file, so new: head.weight, head.bias' in r.stdout # and nothing else is new
    assert '64 -> 46 -> 34 -> 25 tokens' in r.stdout
    assert json.loads((tmp_path/'run'/'model.json').read_text())['info']['train_photographs']>30
