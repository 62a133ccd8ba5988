"fastai's habits with every method, weights from anywhere, and trainings that go on from others."
import json, os, subprocess, sys
import numpy as np, pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.data.all import (CategoryBlock, DataBlock, DataLoaders, MultiCategoryBlock, Normalize, RegressionBlock,
                             TransformBlock)
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorMask
from fastcore.foundation import L
from safetensors.torch import load_file, save_file
from attn_diversity.learner import load_vit, prune_learner, save_vit, saved_run
from attn_diversity.methods import METHODS, method_config
from attn_diversity.resume import fit_saved

pytestmark = pytest.mark.filterwarnings('ignore')
tiny = dict(patch_size=4, embed_dim=24, depth=4, num_heads=3)

@pytest.fixture(scope='module')
def images(): # [32, 3, 8, 8], and classes
    torch.manual_seed(0)
    return torch.rand(32, 3, 8, 8),[i%3 for i in range(32)]

def data(x, y, n=8, **kw): # DataLoaders of tensors
    items = list(zip(x, y))
    dls = DataLoaders.from_dsets(items, items[:16], bs=n, device='cpu', num_workers=0)
    for k,v in kw.items(): setattr(dls, k, v)
    return dls

@pytest.fixture
def dls(images): return data(*images, c=3)

def blocks(images, block=CategoryBlock, get_y=lambda i: 'xyz'[i%3]): # what fastai can make anew without items
    block = DataBlock((TransformBlock, block), get_x=lambda i: images[0][i], get_y=get_y,
                      splitter=lambda o: (o, o[:16]))
    return block.dataloaders(range(32), bs=8, num_workers=0, device='cpu')

def learner(dls, arch='vit_tiny_patch16_224', **kw):
    torch.manual_seed(0)
    learn = prune_learner(dls, arch, **{**(dict(pretrained=False, **tiny) if isinstance(arch, str) else {}), **kw})
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def names(learn): return {id(p): n for n,p in learn.model.named_parameters()}
def copied(learn): return {n: p.detach().clone() for n,p in learn.model.named_parameters()}
def moved(learn, was): return {n for n,p in learn.model.named_parameters() if not torch.equal(p, was[n])}

LOAD = '''
import sys, torch, warnings
warnings.simplefilter('ignore')
from fastai.learner import load_learner
for name in sys.argv[2:]:
    learn = load_learner(f'{sys.argv[1]}/{name}.pkl')
    torch.manual_seed(0)
    with torch.no_grad(): torch.save(learn.model.eval()(torch.load(f'{sys.argv[1]}/x.pt')), f'{sys.argv[1]}/{name}.pt')
'''

@pytest.mark.parametrize('method', METHODS)
def test_habits_of_fastai(method, images, tmp_path):
    "Each with each method; where fastai has a number to say, it is one"
    dls = blocks(images)
    learn = learner(dls, method=method, path=tmp_path, lr=1e-3)
    was,head = copied(learn),{n for n in copied(learn) if n.startswith(('head.','predictors.'))}
    learn.freeze()
    learn.fit(1)
    assert moved(learn, was)==head # exactly: no norm of the body, and the bias of the head
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())
    learn.fine_tune(1)
    assert moved(learn, was)>={'head.weight','blocks.0.attn.qkv.weight','pos_embed','norm.bias'}
    assert learn.lr_find(num_it=6, show_plot=False).valley>0
    assert learn.tta(n=1)[0].shape==(16,3)
    seen = ClassificationInterpretation.from_learner(learn).confusion_matrix()
    assert seen.sum()==16
    learn.fit(3, cbs=EarlyStoppingCallback(monitor='valid_loss', min_delta=1e9, patience=1))
    assert len(learn.recorder.values)==2
    learn.fit(1, cbs=GradientAccumulation(16))
    was = copied(learn)
    learn.to_fp16().fit(1)
    assert moved(learn, was)>={'head.bias','blocks.3.mlp.fc1.weight'}
    learn.to_fp32()

def test_export_and_load_in_a_fresh_process(images, tmp_path):
    "Every method: the loaded Learner answers as the living one, which trains on"
    dls,x = blocks(images),torch.rand(4,3,8,8)
    torch.save(x, tmp_path/'x.pt')
    want = {}
    for method in METHODS:
        learn = learner(dls, method=method, path=tmp_path)
        learn.fit(1)
        opt = learn.opt
        learn.export(f'{method}.pkl')
        assert learn.opt is opt and learn.dls is dls
        torch.manual_seed(0)
        with torch.no_grad(): want[method] = learn.model.eval()(x)
        was = copied(learn)
        learn.fit(1)
        assert moved(learn, was)
    subprocess.run([sys.executable, '-c', LOAD, str(tmp_path), *METHODS], check=True,
                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for method,y in want.items(): torch.testing.assert_close(torch.load(tmp_path/f'{method}.pt'), y)

def test_a_failed_export_leaves_the_learner_and_the_file(images, tmp_path):
    dls = blocks(images)
    learn = learner(dls, path=tmp_path)
    learn.fit(1)
    learn.export()
    good = (tmp_path/'export.pkl').read_bytes()
    class Stuck(Callback):
        def __reduce__(self): raise TypeError('it is stuck')
    learn.add_cb(Stuck())
    opt,was = learn.opt,copied(learn)
    with pytest.raises(RuntimeError, match='could not be exported .TypeError: it is stuck.*goes on as before'):
        learn.export()
    assert learn.dls is dls and learn.opt is opt and (tmp_path/'export.pkl').read_bytes()==good
    assert [f.name for f in tmp_path.glob('export*')]==['export.pkl']
    learn.fit(1)
    assert moved(learn, was) and len(learn.recorder.losses)==4
    compiled = learner(dls, compile='eager', path=tmp_path)
    compiled.export()
    assert hasattr(compiled.model, '_orig_mod')
    again = load_learner(tmp_path/'export.pkl')
    assert not hasattr(again.model, '_orig_mod')
    again.dls,was = dls,copied(again)
    again.fit(1)
    assert moved(again, was)

def test_rates_and_decay_by_group(dls):
    learn = learner(dls, wd=.1)
    class Rates(Callback):
        order,run_valid = 61,False
        def before_fit(self): self.seen = []
        def before_batch(self): self.seen.append([h['lr'] for h in self.opt.hypers])
    learn.add_cb(Rates())
    learn.fit(2, lr=slice(1e-6, 1e-3))
    falls = (1+np.cos(np.pi*np.arange(8)/8))/2
    np.testing.assert_allclose(learn.rates.seen, falls[:,None]*[1e-6,1e-3], rtol=1e-6)
    decay = {names(learn)[id(p)]: g['weight_decay'] for g in learn.opt.opt.param_groups for p in g['params']}
    for n,p in learn.model.named_parameters(): # not norms, biases, positions and the class token
        assert decay[n]==(.1 if p.ndim>1 and n not in ('pos_embed','cls_token') else 0), n
    learn.fit(1, wd=.3)
    assert {g['weight_decay'] for g in learn.opt.opt.param_groups}=={0,.3}
    # rates a layer, on top of rates a group
    learn = learner(dls, layer_decay=.5)
    learn.create_opt()
    learn.opt.set_hyper('lr', slice(1e-3, 1e-2))
    rate = {names(learn)[id(p)]: g['lr'] for g in learn.opt.opt.param_groups for p in g['params']}
    assert rate['head.bias']==1e-2
    assert rate['blocks.2.norm1.bias']==pytest.approx(rate['blocks.3.mlp.fc2.weight']/2)
    assert rate['pos_embed']==pytest.approx(rate['blocks.3.mlp.fc2.weight']/16)
    assert rate['norm.weight']==pytest.approx(rate['blocks.3.mlp.fc2.weight'])==5e-4
    assert learn.settings['layer_decay']==.5

def test_a_splitter_of_ones_own(dls):
    def thirds(m): return [list(m.patch_embed.parameters()), list(m.blocks.parameters()), list(m.head.parameters())]
    learn = learner(dls, splitter=thirds)
    was = copied(learn)
    learn.freeze_to(-2)
    learn.fit(1, lr=[1e-5,1e-4,1e-3])
    assert moved(learn, was)=={n for n in was if n.startswith(('blocks.','head.'))}
    assert [len(g) for g in learn.opt.param_lists]==[len(g) for g in thirds(learn.model)]

def test_schedules(dls):
    for cbs in (ReduceLROnPlateau(), [ReduceLROnPlateau(patience=1)]):
        with pytest.raises(ValueError, match='ReduceLROnPlateau and the cosine.*schedule=None'):
            learner(dls).fit(1, cbs=cbs)
    learn = learner(dls, schedule=None, cbs=ReduceLROnPlateau(patience=1, min_delta=1e9, factor=10.))
    learn.fit(3, lr=1e-3)
    assert learn.recorder.lrs[::4]==pytest.approx([1e-3,1e-3,1e-4]) # fastai's OptimWrapper would not change it
    assert learn.settings['schedule'] is None

class Mark(Callback): pass

def test_callbacks_in_any_container(dls, tmp_path):
    mark = Mark()
    for cbs in (mark, [mark], (mark,), L(mark), (c for c in [mark]), Mark):
        assert sum(isinstance(c, Mark) for c in learner(dls, cbs=cbs).cbs)==1
    for i,cbs in enumerate((mark, L(mark), (c for c in [mark]), None)):
        fit_saved(learner(dls), 1, tmp_path/str(i), cbs=cbs)

@pytest.mark.parametrize('kw,error,said', [
    (dict(cbs=3), TypeError, 'cbs: 3 is no fastai callback'),
    (dict(loss_func=3), TypeError, 'loss_func=3: give a function'),
    (dict(metrics=3), TypeError, 'metrics: 3 is none'), (dict(splitter=3), TypeError, 'splitter=3: give a function'),
    (dict(schedule='step'), ValueError, "schedule='step': 'cosine', or None"),
    (dict(layer_decay=0), ValueError, 'layer_decay=0: the share'), (dict(keep_rate=2), ValueError, '(0, 1]'),
    (dict(arch='vit_tiny_patch16_224', checkpoint='none.pth'), FileNotFoundError, 'none.pth is not there')])
def test_a_refusal_changes_nothing(dls, kw, error, said):
    model = timm.create_model('vit_tiny_patch16_224', img_size=8, num_classes=7, **tiny)
    before = [len(dl.after_batch.fs) for dl in dls.loaders]
    with pytest.raises(error) as e: learner(dls, **{'arch': model, **kw})
    assert said in str(e.value)
    assert [len(dl.after_batch.fs) for dl in dls.loaders]==before
    assert model.num_classes==7 and type(model.blocks[1]).__name__=='Block'

def test_fit_saved_refuses_what_is_no_learner(tmp_path):
    with pytest.raises(TypeError, match="learn='learn': give a Learner"): fit_saved('learn', 1, tmp_path/'run')
    assert not any(tmp_path.iterdir())

def test_fit_saved_takes_a_slice(dls, tmp_path):
    learn = learner(dls)
    fit_saved(learn, 1, tmp_path, lr=slice(1e-6,1e-3))
    assert learn.recorder.lrs[0]==1e-3
    assert fit_saved(learner(dls), 1, tmp_path, lr=slice(1e-6,1e-3), resume=True)['best_epoch']==0
    with pytest.raises(ValueError, match="lr='x' .str.: the learning rate"):
        fit_saved(learner(dls), 1, tmp_path, lr=slice('x',1.))

# --- train on

@pytest.fixture(scope='module')
def run(images, tmp_path_factory):
    "A model that was trained by ToMe on three classes"
    out = tmp_path_factory.mktemp('run')/'run'
    learn = learner(data(*images, c=3, vocab=['a','b','c']), method='tome', r=1, drop_path_rate=.1)
    learn.fit(1, 1e-3)
    return save_vit(learn, out)

@pytest.mark.parametrize('how', [dict(arch=0), dict(checkpoint=0), dict(checkpoint=1), dict(arch=1)])
def test_train_on_from_a_run(images, run, how):
    "Nothing said: all as it was; the head too, as the classes are the same"
    (k,i), = how.items()
    dls = data(*images, c=3, vocab=['a','b','c'])
    learn = prune_learner(dls, **{k: (str(run), run/'model.safetensors')[i]})
    weights = load_file(run/'model.safetensors')
    assert all(torch.equal(v, weights[n]) for n,v in learn.model.state_dict().items())
    assert method_config(learn.model)==dict(method='tome', r=[1]*4)
    made = saved_run(run)
    assert learn.recipe['arch']==made['arch'] and learn.recipe['arch_args']==made['arch_args']
    assert learn.recipe['checkpoint']==str((run/'model.safetensors').resolve())
    assert learn.model.blocks[3].drop_path1.drop_prob==pytest.approx(.1)

def test_explicit_arguments_win(images, run, capsys):
    dls = data(*images, c=3, vocab=['a','b','c'])
    assert method_config(prune_learner(dls, run, r=2).model)==dict(method='tome', r=[2]*4)
    learn = prune_learner(dls, run, method='medad', keep_rate=.5, drop_path_rate=0.)
    assert method_config(learn.model)['keep_rate']==[.5]*3
    assert learn.recipe['arch_args']['drop_path_rate']==0
    with pytest.raises(ValueError, match='keep_rate: ToMe has no such setting'): prune_learner(dls, run, keep_rate=.5)
    capsys.readouterr()
    # other classes, as many of them: their head is not taken for these
    learn = prune_learner(data(*images, c=3, vocab=['x','y','z']), run)
    assert not torch.equal(learn.model.head.weight, load_file(run/'model.safetensors')['head.weight'])
    assert 'trained on other classes, a, b, c: the head is new' in capsys.readouterr().out

def test_the_settings_of_each_method_come_along(images, tmp_path):
    dls = data(*images, c=3, vocab=['a','b','c'])
    cases = dict(variance=dict(keep_rate=(.9,.8,.7), fuse=False), evit=dict(keep_rate=.5), none={},
                 dynamicvit=dict(keep_rate=.6), fold=dict(r=1, indicator='medad', lam=.25))
    for method,kw in cases.items():
        learn = learner(dls, method=method, **kw)
        back = prune_learner(dls, save_vit(learn, tmp_path/method))
        assert method_config(back.model)==method_config(learn.model)
        weights = learn.model.state_dict() # DynamicViT's predictors, too
        assert all(torch.equal(v, weights[n]) for n,v in back.model.state_dict().items())
    fewer = prune_learner(dls, tmp_path/'variance', keep_rate=.5)
    assert method_config(fewer.model)['keep_rate']==[.5]*3 and not method_config(fewer.model)['fuse']
    def spread(a): return a.amax(1)-a.amin(1)
    save_vit(learner(dls, indicator=spread), tmp_path/'own')
    with pytest.raises(ValueError, match='an indicator of your own, spread'): prune_learner(dls, tmp_path/'own')
    assert method_config(prune_learner(dls, tmp_path/'own', spread).model)['method']=='spread (own)'
    assert method_config(prune_learner(dls, tmp_path/'own', 'mean').model)['method']=='mean'

def test_weights_of_another_model_are_refused(dls, run, tmp_path):
    "DINOv2's weights in a DeiT: by the file beside them, and by their tensors where there is none"
    dino = learner(dls, 'vit_small_patch14_dinov2')
    save_vit(dino, tmp_path/'dino')
    for kw in (dict(arch='vit_tiny_patch16_224', checkpoint=tmp_path/'dino'),
               dict(arch='deit_small_patch16_224', checkpoint=tmp_path/'dino'/'model.safetensors')):
        with pytest.raises(ValueError, match='has the weights of vit_small_patch14_dinov2, and arch='):
            learner(dls, **kw)
    save_file(dino.model.state_dict(), tmp_path/'dino.safetensors')
    with pytest.raises(ValueError, match='of another model: .* no place for blocks.0.ls1.gamma.*LayerScale'):
        learner(dls, checkpoint=tmp_path/'dino.safetensors')
    assert learner(dls, 'vit_small_patch14_dinov2', checkpoint=tmp_path/'dino.safetensors')
    with pytest.raises(ValueError, match='each names weights'): prune_learner(dls, run, checkpoint=run)
    with pytest.raises(FileNotFoundError, match='has no model.json: give a folder'):
        learner(dls, checkpoint=tmp_path)
    with pytest.raises(FileNotFoundError, match='is no timm ViT, and no folder'):
        prune_learner(dls, tmp_path/'dino.safetensors')

def test_an_interrupted_run_names_its_best(dls, run, tmp_path):
    learn = learner(dls)
    fit_saved(learn, 1, tmp_path/'run')
    with pytest.raises(FileNotFoundError) as e: prune_learner(dls, tmp_path/'run')
    assert str(tmp_path/'run'/'best') in str(e.value)
    assert prune_learner(dls, tmp_path/'run'/'best')
    with pytest.raises(ValueError, match='epochs: 1 then, 2 now.*To train on from its weights.*best'):
        fit_saved(learner(dls), 2, tmp_path/'run', resume=True)

def test_load_vit_by_its_file(run):
    for path in (run, run/'model.safetensors', run/'model.json', str(run/'model.safetensors')):
        assert load_vit(path).recipe['classes']==['a','b','c']

def test_what_is_saved(images, tmp_path):
    old = os.umask(0o027)
    try: run = save_vit(learner(data(*images, c=3, path=tmp_path)), tmp_path/'run')
    finally: os.umask(old)
    assert [(run/n).stat().st_mode & 0o777 for n in ('model.safetensors','model.json')]==[0o640]*2
    made = json.loads((run/'model.json').read_text())
    assert made['data']==str(tmp_path) and made['checkpoint'] is None and made['target']=='classes'
    assert set(made['versions'])=={'attn_diversity','commit','python','torch','timm','fastai'}
    assert made['versions']['torch']==torch.__version__ and made['versions']['attn_diversity']
    assert made['mean']==[.5]*3 and 'resize' in made

def test_the_normalisation_is_that_of_the_training(images, tmp_path):
    "The user's own Normalize is what the model has seen"
    dls = data(*images, c=3)
    for dl in dls.loaders: dl.after_batch.add(Normalize.from_stats([.1,.2,.3], [.4,.5,.6]))
    learn = learner(dls)
    assert (learn.recipe['mean'], learn.recipe['std'])==([.1,.2,.3], [.4,.5,.6])
    assert sum(isinstance(f, Normalize) for f in dls.train.after_batch.fs)==1

# --- any target, any picture

def fits(learn):
    learn.fit(1, 1e-3)
    assert np.isfinite([v for v in learn.recorder.values[0] if v is not None]).all()
    return learn

@pytest.mark.parametrize('channels', [1,4])
def test_other_channels(images, channels, tmp_path):
    x,y = images
    x = x[:,:1].repeat(1, channels, 1, 1)
    learn = fits(learner(data(x, y, c=3)))
    assert learn.recipe['mean']==[.5]*channels and learn.recipe['arch_args']['in_chans']==channels
    back,x = load_vit(save_vit(learn, tmp_path/'run')),torch.rand(2, channels, 8, 8)
    torch.testing.assert_close(back(x), learn.model.eval()(x))
    base = timm.create_model('vit_tiny_patch16_224', img_size=8, num_classes=3, **tiny)
    save_file(base.state_dict(), tmp_path/'rgb.safetensors')
    grey = learner(data(images[0][:,:1], y, c=3), checkpoint=tmp_path/'rgb.safetensors')
    torch.testing.assert_close(grey.model.patch_embed.proj.weight, base.patch_embed.proj.weight.sum(1, keepdim=True))
    dls = data(x[:1].repeat(32,1,1,1), y, c=3)
    n = len(dls.train.after_batch.fs)
    with pytest.raises(ValueError, match=f'images of 3 channels, the data has {channels}.*in_chans={channels}'):
        learner(dls, base)
    assert len(dls.train.after_batch.fs)==n

def test_the_loss_of_the_data(images):
    "fastai's rule, with the outputs and the metric that go with it"
    cases = [(CategoryBlock, lambda i: 'xyz'[i%3], CrossEntropyLossFlat, 3, ['accuracy'], 'classes'),
             (MultiCategoryBlock(vocab=list('xyz')), lambda i: ['x','yz'[i%2]], BCEWithLogitsLossFlat, 3,
              ['accuracy_multi'], 'labels'),
             (RegressionBlock, lambda i: i/32, MSELossFlat, 1, [], 'numbers'),
             (RegressionBlock(2), lambda i: [i/32,1.], MSELossFlat, 2, [], 'numbers')]
    for block,get_y,loss,n,metrics,target in cases:
        learn = fits(learner(blocks(images, block, get_y)))
        assert type(learn.loss_func.func) is type(loss().func) and learn.model.num_classes==n
        assert [m.name for m in learn.metrics]==metrics and learn.recipe['target']==target
    mask = TransformBlock(type_tfms=lambda i: TensorMask(torch.zeros(8, 8).long()))
    with pytest.raises(ValueError, match=r'shape \[8, 8, 8\].*pass the loss_func'):
        learner(blocks(images, mask, lambda i: i))
    x,y = images
    with pytest.raises(ValueError, match=r'shape \[8, 2\].*pass the loss_func'): learner(data(x, torch.rand(32,2)))
    assert learner(data(x, torch.rand(32,2)), loss_func=MSELossFlat()).model.num_classes==2
    assert learner(data(x, torch.rand(32,2).round()), loss_func=BCEWithLogitsLossFlat()).recipe['target']=='labels'
    teacher = timm.create_model('vit_tiny_patch16_224', img_size=8, num_classes=2, **tiny)
    with pytest.raises(ValueError, match='teacher: it teaches how probable each class is, and this data has numbers'):
        learner(data(x, torch.rand(32,2)), loss_func=MSELossFlat(), teacher=teacher)
    with pytest.raises(ValueError, match='one class index an image'):
        learner(data(x, torch.rand(32,2)), loss_func=MSELossFlat(), mix=True).fit(1)
    assert not learner(data(x, y, c=3), metrics=()).metrics

@pytest.mark.parametrize('mix', [False,True])
def test_class_weights(dls, mix):
    "A class of weight 0 teaches its row of the head nothing of its own images; alone or mixed"
    weight = torch.tensor([1.,1.,0.])
    for loss in (CrossEntropyLossFlat(weight=weight), torch.nn.CrossEntropyLoss(weight=weight)):
        learn = fits(learner(dls, loss_func=loss, mix=mix, metrics=accuracy))
        assert learn.loss_func is loss

def test_hub_that_does_not_answer(dls, monkeypatch, capsys):
    "Its cache is asked at once, the switch is put back, in the error's case too, and the error says what to do"
    from huggingface_hub import constants
    seen = []
    def no_network(): raise OSError('no route')
    def create(*args, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError('nothing in the cache')
    monkeypatch.setattr('attn_diversity.attention.get_session', no_network)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(RuntimeError, match="checkpoint='weights.safetensors'"):
        prune_learner(dls, 'vit_tiny_patch16_224')
    assert seen==[True] and constants.HF_HUB_OFFLINE is False
    assert 'does not answer (OSError): its cache is asked' in capsys.readouterr().out

def test_example_vit_without_a_hub(monkeypatch):
    "One short question, the cache, and then random weights that say so"
    from attn_diversity.attention import example_vit
    from huggingface_hub import constants
    asked,make = [],timm.create_model
    def no_network(): raise OSError('no route')
    def create(name, pretrained=False, **kwargs):
        asked.append((pretrained, constants.HF_HUB_OFFLINE))
        if pretrained: raise OSError('nothing in the cache')
        return make(name, **kwargs)
    monkeypatch.setattr('attn_diversity.attention.get_session', no_network)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.warns(UserWarning, match='SKIPPED trained weights'): model = example_vit('none.safetensors')
    assert not model.trained and asked==[(True,True),(False,False)]
