"The commands, as a person types them."
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from sklearn.datasets import load_sample_image

shared = Path(__file__).parents[2]/'shared'

def run(*args, **env):
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
    r = run('attn_diversity_train', photos, *small, '--indicator', 'medad', '--keep_rate', '0.5',
            '--out', tmp_path/'run')
    (photos/'china'/'bad.jpg').unlink()
    assert r.returncode==0, r.stderr
    assert 'bad.jpg' in r.stderr and '9 -> 6 -> 4 -> 3 tokens' in r.stdout
    written = {f.name for f in (tmp_path/'run').iterdir()}
    assert written=={'best','model.safetensors','model.json','history.csv','kept_patches.png'}
    made = json.loads((tmp_path/'run'/'model.json').read_text())
    assert made['classes']==['china','flower'] and made['pruning']['method']=='medad'
    history = pd.read_csv(tmp_path/'run'/'history.csv')
    assert len(history)==1 and history.gflops[0]>0 and history['img/s'][0]>0
    check = ("from attn_diversity.learner import load_vit; import torch; m = load_vit('run'); "
             "print(m(torch.zeros(1,3,48,48)).shape)")
    back = subprocess.run([sys.executable, '-c', check], cwd=tmp_path, capture_output=True, text=True)
    assert 'torch.Size([1, 2])' in back.stdout, back.stderr
    again = run('attn_diversity_train', photos, *small, '--out', tmp_path/'run')
    assert again.returncode!=0 and '--overwrite' in again.stderr

@pytest.mark.parametrize('args,said,pruning,drawn', [
    (('--method','tome','--r','1'), '9 -> 8 -> 7 -> 6 -> 5 -> 4', dict(method='tome', r=[1]*12), True),
    (('--method','evit'), '9 -> 8 -> 7 -> 6 tokens, by evit',
     dict(method='evit', keep_rate=[.7]*3, blocks=[3,6,9]), True),
    (('--method','none'), 'all tokens, unpruned', dict(method='none'), False),
], ids=lambda v: v[1] if isinstance(v, tuple) else None)
def test_any_method_with_its_own_settings(args, said, pruning, drawn, photos, tmp_path):
    r = run('attn_diversity_train', photos, *small, *args, '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert said in r.stdout
    assert json.loads((tmp_path/'run'/'model.json').read_text())['pruning']==pruning
    assert (tmp_path/'run'/'kept_patches.png').exists()==drawn # of an unpruned model there is nothing to see

@pytest.mark.parametrize('args,said', [
    (('nowhere',), 'nowhere is not there'),
    (('{photos}','--keep_rate','1.3'), 'keep_rate=1.3: the share of patches to keep must lie in (0, 1]'),
    (('{photos}','--indicator','varience'), 'take one of mean, variance, medad'),
    (('{photos}','--arch','vit_smal'), "no model 'vit_smal'"),
    (('{photos}','--arch','swin_tiny_patch4_window7_224','--scratch'), 'tokens of this SwinTransformer'),
    (('{photos}','--method','merge'), 'take one of mean, variance, medad, random, evit, tome, fold, dynamicvit, none'),
    (('{photos}','--method','tome','--keep_rate','0.3'), 'keep_rate: ToMe has no such setting, only r'),
    (('{photos}','--r','5'), 'r: variance has no such setting'),
    (('{photos}','--method','none','--keep_rate','0.3'), 'keep_rate: unpruned has no such setting'),
    (('{photos}','--method','tome','--no_fuse'), 'fuse: ToMe has no such setting'),
    (('{photos}','--method','tome','--indicator','nonsense'), 'Give one of them'),
    (('{photos}','--method','evit','--compile'), 'Train it without compile'),
    (('{photos}','--img_size','50','--scratch','--arch','vit_tiny_patch16_224'), '50'),
    (('{photos}','--checkpoint','none.safetensors','--img_size','48','--arch','vit_tiny_patch16_224'),
     'none.safetensors is not there'),
    (('{photos}','--img_size','48','--arch','vit_tiny_patch16_224'), 'checkpoint='), # no network: what to do
], ids=lambda v: v[-1] if isinstance(v, tuple) else None)
def test_mistakes_are_answered_in_one_line(args, said, photos, tmp_path):
    r = run('attn_diversity_train', *(a.format(photos=photos) for a in args), '--out', tmp_path/'out',
            HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hub'))
    assert r.returncode==1
    assert said in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'out').exists() # nothing is left behind

def test_demo_in_its_shortest_form(tmp_path):
    r = run('attn_diversity_demo', '--epochs', '1', '--tune_epochs', '1', '--out', tmp_path/'demo')
    assert r.returncode==0, r.stderr
    table = pd.read_csv(tmp_path/'demo'/'results.csv')
    assert list(table.indicator)==['none','variance','medad']
    assert list(table['tokens by stage'])==['36 36 36 36','36 27 20 15','36 27 20 15']
    assert table['seconds an epoch'].gt(0).all() and 'seconds an epoch' in r.stdout
    assert Image.open(tmp_path/'demo'/'kept_patches.png').size[0]>300
    assert run('attn_diversity_demo', '--keep_rate', '0').returncode==1

def test_overlapping_patches(photos, tmp_path):
    r = run('attn_diversity_train', photos, *small, '--stride', '12', '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert '9 -> 8 -> 7 -> 6 tokens' in r.stdout # (48-16)//12 + 1 = 3 a side
    assert json.loads((tmp_path/'run'/'model.json').read_text())['stride']==12
    r = run('attn_diversity_train', photos, *small, '--stride', '17', '--out', tmp_path/'no')
    assert r.returncode==1 and 'stride=17' in r.stderr and not (tmp_path/'no').exists()

def test_bench_tells_gain_and_realised_saving(tmp_path):
    r = run('attn_diversity_bench', '--archs', 'vit_tiny_patch16_224', '--img_sizes', '64,96',
            '--batch_sizes', '2', '--keep_rates', '0.7,0.4', '--indicators', 'variance',
            '--seconds', '0.2', '--device', 'cpu', '--out', tmp_path/'b')
    assert r.returncode==0, r.stderr
    t,about = pd.read_csv(tmp_path/'b'/'bench.csv'),json.loads((tmp_path/'b'/'bench.json').read_text())['about']
    assert len(t)==2*3 and list(t.indicator[:3])==['none','variance','variance']
    for _,g in t.groupby('image size'):
        np.testing.assert_allclose(g['realised saving'], g.gain*g.GFLOPs/g.GFLOPs.iloc[0])
    assert about['precision']=='float32' and 'cpu' in about['device'] and about['timm']
    assert Image.open(tmp_path/'b'/'bench.png').size[0]>500
    again = run('attn_diversity_bench', '--out', tmp_path/'b')
    assert again.returncode==1 and '--overwrite' in again.stderr and 'Traceback' not in again.stderr
    wrong = run('attn_diversity_bench', '--keep_rates', '1.3', '--out', tmp_path/'c')
    assert wrong.returncode==1 and '(0, 1]' in wrong.stderr and not (tmp_path/'c').exists()

@pytest.mark.skipif(not (shared/'data'/'flowers').is_dir(), reason='../shared/data/flowers is missing')
def test_trained_vit_on_real_photographs(tmp_path):
    "The saliency ViT at another image size, on a sixteenth of the flowers"
    for d in (shared/'data'/'flowers').iterdir():
        (tmp_path/'f'/d.name).mkdir(parents=True)
        for f in sorted(d.iterdir())[::16]: shutil.copy(f, tmp_path/'f'/d.name)
    r = run('attn_diversity_train', tmp_path/'f', '--arch', 'vit_small_patch14_dinov2',
            '--checkpoint', shared/'models'/'vit_small_patch14_saliency.safetensors',
            '--img_size', '112', '--epochs', '1', '--out', tmp_path/'run')
    assert r.returncode==0, r.stderr
    assert 'not in the file, so new: head.weight, head.bias' in r.stdout # and nothing else is new
    assert '64 -> 46 -> 34 -> 25 tokens' in r.stdout
    assert json.loads((tmp_path/'run'/'model.json').read_text())['info']['train_photographs']>150
