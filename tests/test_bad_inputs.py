"What is wrong is said in a sentence: each row of bad_inputs.csv is a call or a command, and words of the sentence."
import collections, functools, importlib, json, os, shlex, signal
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, timm, torch
from fastai.data.all import DataLoaders
from PIL import Image
from safetensors.torch import save_file
from timm.models import VisionTransformer
from attn_diversity.__main__ import main
from attn_diversity.methods import reduce_vit

ROWS = pd.read_csv(Path(__file__).with_name('bad_inputs.csv'), keep_default_na=False)
MODULES = ('attention','reduction','families','reduce','indicators','fusion','pruning','overlap','tome','fold',
           'dynamicvit','measure','bench','methods','data','prepare','callbacks','augment','teachers','learner',
           'resume','vis','anatomy','session','explorer','experiments','commands')
OURS = (ValueError, TypeError, RuntimeError, OSError) # FileNotFoundError and FileExistsError are OSErrors
SECONDS = 20 # a row; a hang lasts longer

def vit(method=None, **settings): # of 16 patches, 4 blocks, 3 heads and 5 classes
    torch.manual_seed(0)
    made = {k: settings.pop(k) for k in ('num_classes','img_size','global_pool') if k in settings}
    made = dict(dict(img_size=32, num_classes=5), **made)
    model = VisionTransformer(patch_size=8, embed_dim=24, depth=4, num_heads=3, **made).eval()
    return model if method is None else reduce_vit(model, method, **settings)

def pictures(folder, classes, n=4):
    rng = np.random.default_rng(0)
    for c in classes:
        (folder/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0, 255, (40,40,3), dtype=np.uint8)).save(folder/c/f'{i}.jpg')
    return folder

RESULT = dict(accuracy=.9, best_accuracy=.9, gflops=1., images_per_s=9., unpruned_gflops=2., unpruned_images_per_s=5.,
              train_images=3, valid_images=2, epochs=1, device='cpu', torch='2', timm='1')

def sweep_of(folder, settings='{"data": "digits"}', run='variance-0.6-fused', result=None, **more):
    "A folder as a sweep leaves it, with one result"
    (folder/run).mkdir(parents=True)
    (folder/'settings.json').write_text(settings)
    result = json.dumps({k: v for k,v in {**RESULT, **more}.items() if v is not ...}) if result is None else result
    (folder/run/'result.json').write_text(result)
    return folder

def files(tmp): # what rows name by a path
    pictures(tmp/'photos', ('cat','dog'))
    pictures(tmp/'one', ('cat',))
    (tmp/'empty').mkdir()
    (tmp/'file').write_text('text')
    pictures(tmp/'holey', ('cat',))
    (tmp/'holey'/'dog').mkdir()
    (tmp/'holey'/'dog'/'0.jpg').write_text('text')
    (tmp/'bench'/'bench.csv').mkdir(parents=True)
    save_file({'a': torch.zeros(2)}, tmp/'other.safetensors')
    (tmp/'text.safetensors').write_text('text')
    torch.save({'a': print}, tmp/'code.pth')
    for name,text in dict(nojson='{', nopruning='{}', list='[]').items():
        (tmp/name).mkdir()
        (tmp/name/'model.json').write_text(text)

def sweeps(tmp):
    s = tmp/'sweeps'
    sweep_of(s/'good')
    sweep_of(s/'torn', result='{"accuracy": .9')
    sweep_of(s/'listed', result='[]')
    sweep_of(s/'less', best_accuracy=...)
    sweep_of(s/'nothing', images_per_s=0.)
    sweep_of(s/'nan', accuracy=float('nan'))
    sweep_of(s/'text', gflops='much')
    sweep_of(s/'noplain', run='unpruned', best_accuracy=...)
    sweep_of(s/'nodevice', device=...)
    sweep_of(s/'settings', settings='{"data": ')
    sweep_of(s/'list', settings='[]')
    return s

@pytest.fixture(scope='module')
def space(tmp_path_factory):
    "What the rows know by name"
    tmp = tmp_path_factory.mktemp('bad')
    files(tmp)
    known = dict(np=np, pd=pd, torch=torch, timm=timm, plt=plt, nn=torch.nn, Path=Path, DataLoaders=DataLoaders, os=os,
                 tmp=tmp, photos=tmp/'photos', sweeps=sweeps(tmp), vit=vit, inf=float('inf'), nan=float('nan'))
    modules = [importlib.import_module(f'attn_diversity.{m}') for m in MODULES]
    for m in modules: known.update({n: getattr(m, n) for n in m.__all__})
    torch.manual_seed(0)
    known.update(x=torch.randn(2, 3, 32, 32), scores=torch.rand(2, 5), keys=torch.rand(2, 16, 8))
    dls = known['folder_dls'](tmp/'photos', 32, 2, n_workers=0)
    learn = known['prune_learner'](dls, vit())
    known['save_vit'](learn, tmp/'saved')
    return dict(known, dls=dls, learn=learn)

class Hang(BaseException): "A row took too long"
def ring(number, frame): raise Hang

def of_call(call, says, space): # (kind, what was said)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try: got = eval(call, dict(space))
    except Hang: return 'hang', ''
    except OURS as e: return ('sentence' if says in str(e) else 'traceback'), f'{type(e).__name__}: {e}'
    except Exception as e: return 'traceback', f'{type(e).__name__}: {e}'
    finally: signal.alarm(0)
    return 'silent', repr(got)[:200]

def of_command(call, says, space):
    words = shlex.split(call.format(**{k: space[k] for k in ('tmp','photos','sweeps')}))
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try: main(words)
    except Hang: return 'hang', ''
    except SystemExit as e: return ('sentence' if says in str(e.code) else 'traceback'), str(e.code)
    finally: signal.alarm(0)
    return 'silent', ''

def test_bad_inputs_are_answered_in_a_sentence(space, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(ROWS)>=150 and not ROWS.call.duplicated().any() and ROWS.says.str.len().gt(3).all()
    found = []
    for r in ROWS.itertuples():
        run = of_command if r.call.startswith('attn_diversity_') else of_call
        found.append((*run(r.call, r.says, space), r.call, r.says))
        plt.close('all')
    kinds = collections.Counter(kind for kind,*_ in found)
    with capsys.disabled(): print(f"\n{len(found)} bad inputs: {dict(kinds)}")
    wrong = [f'{kind}: {call}\n  wanted: {says}\n  got: {got[:600]}'
             for kind,got,call,says in found if kind!='sentence']
    assert not wrong, '\n'.join(wrong)
    assert not any(tmp_path.iterdir()) # nothing is left behind

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='there is no /dev/full')
def test_a_full_disk_is_told_in_a_sentence(space, tmp_path, monkeypatch, capsys):
    "Whatever is written to /dev/full finds no space left"
    small = dict(archs='vit_tiny_patch16_224', keep_rates='.5', indicators='mean', batch_sizes='1', img_sizes='32',
                 seconds=0., device='cpu', overwrite=True)
    sweep_of(tmp_path/'report')
    how = 'vit_tiny_patch16_224',.5,'mean',1,32
    timed = functools.cache(lambda: space['benchmark'](*how, device='cpu', seconds=0))
    monkeypatch.setattr('attn_diversity.commands.benchmark', lambda *args, **kw: timed()) # once for all files
    for name,files,kw in (('report', ('table-2.html','table-2.csv','table-2.png'), {}),
                          ('bench', ('bench.csv','bench.json','bench.png'), small)):
        words = [w for k,v in kw.items() for w in ((f'--{k}',) if v is True else (f'--{k}', str(v)))]
        for file in files:
            (tmp_path/name).mkdir(exist_ok=True)
            (tmp_path/name/file).unlink(missing_ok=True)
            (tmp_path/name/file).symlink_to('/dev/full')
            with pytest.raises(SystemExit) as e: main([f'attn_diversity_{name}', '--out', str(tmp_path/name), *words])
            assert str(e.value).startswith(f'attn_diversity_{name}: ') and 'No space left on device' in str(e.value)
            assert 'Make room' in str(e.value)
            (tmp_path/name/file).unlink()
        if name=='bench': assert 'realised saving' in capsys.readouterr().out # what was measured is told nevertheless

def test_what_nobody_foresaw_is_one_line(space, monkeypatch):
    "An error of a kind that no check raises: one line for who types the command, itself for who calls it"
    def fault(*args): raise KeyError('lost')
    monkeypatch.setattr('attn_diversity.commands.report', fault)
    with pytest.raises(KeyError): space['report_command']()
    with pytest.raises(SystemExit) as e: main(['attn_diversity_report'])
    said = str(e.value)
    assert "KeyError: 'lost'" in said and 'test_bad_inputs.py, line' in said and 'please report it' in said
    assert len(said.splitlines())==1
