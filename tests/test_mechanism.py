"What the one mechanism promises for every method: threads, copies, checkpointing, wrappers, devices, masks, hooks."
import copy, pickle, subprocess, sys, textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import product
import pytest, timm, torch
from torch import nn
from attn_diversity.dynamicvit import decisions
from attn_diversity.methods import METHODS, reduce_vit
from attn_diversity.pruning import prune_vit, trace_patches
from attn_diversity.reduce import reducers_of, restore_vit, set_rate, trace
from attn_diversity.tome import merge_vit

settings = dict(variance=dict(keep_rate=.5), medad=dict(keep_rate=.6, fuse=False), evit=dict(keep_rate=.5),
                tome=dict(r=4), fold=dict(r=4), dynamicvit=dict(keep_rate=.6))
merging = 'tome','fold' # they take no masks, and their knob is r

def vit(name='deit_tiny_patch16_224', **kw):
    torch.manual_seed(0)
    kw = {**dict(depth=4, embed_dim=48, num_heads=4, num_classes=10), **kw}
    model = timm.create_model(name, **kw).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.05)
    return model

def reduced(method, name='deit_tiny_patch16_224', **kw):
    model = reduce_vit(vit(name, **kw), method, **settings[method])
    with torch.no_grad():
        for p in getattr(model, 'predictors', nn.Module()).parameters(): p.add_(torch.randn_like(p)*.3)
    return model.eval()

@pytest.mark.parametrize('method', settings)
def test_eight_threads(method):
    "200 forwards in eight threads, masks and sizes of their own, while others trace and ask for dense features"
    model = reduced(method, dynamic_img_size=True).requires_grad_(False)
    torch.manual_seed(1)
    sizes = [(64,64),(64,96),(96,96),(80,64)]
    images = [torch.randn(2,3,*sizes[i%4]) for i in range(8)]
    masks = []
    for x in images:
        n = x.shape[2]//16*(x.shape[3]//16)
        seen = torch.rand(2,1,1,1+n)>.4
        seen[...,0] = True
        masks.append(None if method in merging else seen)
    jobs = dict(forward=lambda i: model.forward_features(images[i], attn_mask=masks[i]),
                trace=lambda i: trace(model, images[i])[-1],
                dense=lambda i: model.forward_intermediates(images[i], indices=[1,2], intermediates_only=True)[1])
    with torch.inference_mode(): alone = {(what,i): f(i) for what,f in jobs.items() for i in range(8)}
    keys = [('forward',i) for i in range(8)]*25 + [k for k in alone if k[0]!='forward']*10
    def run(key):
        with torch.inference_mode(): return key, jobs[key[0]](key[1])
    with ThreadPoolExecutor(8) as pool: together = list(pool.map(run, keys))
    wrong = [key for key,y in together if y.shape!=alone[key].shape or not torch.allclose(y, alone[key], atol=1e-4)]
    assert len(together)>=200+160 and not wrong, f'{len(wrong)} of {len(together)}'

names = ('deit_tiny_patch16_224','vit_small_patch16_dinov3')

@pytest.mark.parametrize('method', settings)
@pytest.mark.parametrize('name', names)
def test_copies_and_wrappers(method, name):
    model,x = reduced(method, name, img_size=64),torch.randn(2,3,64,64)
    want = model(x)
    others = dict(deepcopy=copy.deepcopy(model), pickle=pickle.loads(pickle.dumps(model)))
    for how,other in others.items():
        torch.testing.assert_close(other(x), want, rtol=0, atol=1e-6, msg=how)
        set_rate(other, 0 if method in merging else 1)
        restore_vit(other)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    torch.testing.assert_close(nn.DataParallel(model)(x), want, rtol=0, atol=1e-6)

def test_pickles_in_a_fresh_process(tmp_path):
    "One that has made no such class"
    want = {}
    for name,method in product(names, settings):
        model,x = reduced(method, name, img_size=64),torch.randn(2,3,64,64)
        want[f'{name} {method}'] = model(x)
        torch.save((model,x), tmp_path/f'{name} {method}.pt')
    script = """
        import sys, torch
        from pathlib import Path
        def answer(f):
            model,x = torch.load(f, weights_only=False)
            return model(x)
        torch.save({f.stem: answer(f) for f in Path(sys.argv[1]).glob('*.pt')}, sys.argv[2])"""
    subprocess.run([sys.executable, '-c', textwrap.dedent(script), tmp_path, tmp_path/'answers'], check=True)
    got = torch.load(tmp_path/'answers')
    assert set(got)==set(want)
    for how in want: torch.testing.assert_close(got[how], want[how], rtol=0, atol=1e-6, msg=how)

@pytest.mark.parametrize('method', settings)
@pytest.mark.parametrize('name', names)
def test_gradient_checkpointing_with_masks(method, name):
    "A block may run twice"
    model,x = reduced(method, name, img_size=64),torch.randn(2,3,64,64)
    n = 1+16 if name.startswith('deit') else 5+16
    seen = torch.rand(2,1,1,n)>.3
    seen[...,:5] = True
    kw = {} if method in merging else dict(attn_mask=seen)
    def grads():
        model.zero_grad()
        torch.manual_seed(0)
        model.forward_head(model.forward_features(x, **kw)).square().sum().backward()
        return {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}
    model.train()
    want = grads()
    model.set_grad_checkpointing(True)
    got = grads()
    assert set(got)==set(want) and len(want)>40
    for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-5, msg=n)

def test_fsdp_on_one_process():
    script = """
        import copy, torch, torch.distributed as dist
        import sys; sys.path.insert(0, 'tests')
        from test_mechanism import reduced, settings
        from torch.distributed.fsdp import fully_shard
        import os
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29613', RANK='0', WORLD_SIZE='1')
        dist.init_process_group('gloo', rank=0, world_size=1)
        for method in settings:
            m,x = reduced(method, img_size=64),torch.randn(2,3,64,64)
            want = m(x)
            for b in m.blocks: fully_shard(b)
            fully_shard(m)
            torch.testing.assert_close(m(x), want, rtol=0, atol=1e-5)
            m(x).sum().backward()
            print(method, 'ok')
        dist.destroy_process_group()"""
    said = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, text=True)
    assert said.stdout.count('ok')==len(settings), said.stderr[-3000:]

@pytest.mark.parametrize('method', settings)
@pytest.mark.parametrize('name', ['deit_tiny_patch16_224','vit_small_patch16_dinov3','vit_base_patch16_siglip_224',
                                  'beit_base_patch16_224'])
def test_every_tensor_is_on_the_device(method, name):
    "The whole forward under PyTorch's fake tensors on `cuda`: needs no GPU, and names a tensor that would be elsewhere"
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device('meta'):
        model = timm.create_model(name, img_size=64, depth=4, embed_dim=48, num_heads=4, num_classes=10).eval()
        reduce_vit(model, method, **settings[method])
    with FakeTensorMode():
        for m in model.modules(): # `to_empty` refuses tensors that are not fake
            for k,v in m._parameters.items():
                if v is not None: m._parameters[k] = nn.Parameter(torch.empty(v.shape, device='cuda'))
            for k,v in m._buffers.items():
                if v is not None: m._buffers[k] = torch.empty(v.shape, dtype=v.dtype, device='cuda')
        x = torch.empty(2,3,64,64, device='cuda')
        mask = torch.ones(2,1,1,model.num_prefix_tokens+16, dtype=torch.bool, device='cuda')
        assert model(x).device.type=='cuda'
        if method not in merging and not name.startswith('beit'):
            assert model.forward_features(x, attn_mask=mask).device.type=='cuda'
        assert all(t.device.type=='cuda' for t in trace(model, x))
        assert model.forward_intermediates(x, intermediates_only=True)[-1].device.type=='cuda'
        model.train()
        assert model(x).device.type=='cuda' # its backward pass would need a GPU
        if method=='dynamicvit':
            with decisions(model) as kept: model(x)
            assert len(kept)==3 and all(k.device.type=='cuda' for k in kept)

@pytest.mark.parametrize('method', [m for m in settings if m not in merging])
def test_masks_never_make_nan(method):
    "Whatever a mask hides, all patches included; and one image's mask does not spoil another's gradient"
    model,x = reduced(method, img_size=112),torch.randn(2,3,112,112, requires_grad=True)
    for hide in (14, 30, 49):
        seen = torch.ones(2,1,1,50, dtype=torch.bool)
        seen[0,...,1:1+hide] = False
        for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
            y = model(x, attn_mask=mask)
            assert y.isfinite().all(), (hide, mask.dtype)
            g, = torch.autograd.grad(y[1].sum(), x, retain_graph=True)
            assert g.isfinite().all() and (g[0]==0).all() and g[1].any()
            model.zero_grad()
            y.square().sum().backward(retain_graph=True)
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize('method', [m for m in settings if m not in merging])
def test_a_mask_that_hides_all_without_a_class_token(method):
    "In a model that pools, a row that may look at nothing is finite in timm, and here, in training too"
    model = reduced(method, 'vit_medium_patch16_gap_240', img_size=112).train()
    seen = torch.ones(2,1,1,49, dtype=torch.bool)
    seen[0] = False
    for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        x = torch.randn(2,3,112,112, requires_grad=True)
        y = model(x, attn_mask=mask)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

@pytest.mark.parametrize('method', settings)
def test_hooks_empty_batches_and_the_meta_device(method):
    model = reduced(method, img_size=64)
    fired = []
    hooks = [b.attn.register_forward_hook(lambda m, args, out, i=i: fired.append(i)) for i,b in enumerate(model.blocks)]
    model(torch.randn(1,3,64,64))
    for h in hooks: h.remove()
    assert fired==[0,1,2,3]
    assert model(torch.randn(0,3,64,64)).shape==(0,10)
    with torch.device('meta'):
        m = timm.create_model('deit_tiny_patch16_224', depth=4)
        reduce_vit(m, method, **settings[method]).eval()
    assert m(torch.empty(2,3,224,224, device='meta')).shape==(2,1000)

@pytest.mark.parametrize('method', settings)
def test_fastai_tensors(method):
    "What a DataLoader of fastai hands out, a subclass of Tensor with methods of its own"
    from fastai.vision.core import TensorImage
    model,x = reduced(method, img_size=64),torch.randn(2,3,64,64)
    torch.testing.assert_close(model(TensorImage(x)).as_subclass(torch.Tensor), model(x), rtol=0, atol=1e-6)

def test_every_order_of_methods_explains_itself():
    for first in settings:
        for second in settings:
            model = reduced(first, img_size=64)
            with pytest.raises(ValueError, match='reduced already.*restore_vit'):
                reduce_vit(model, second, **settings[second])
            assert set(reducers_of(model)), 'still as it was'

@pytest.mark.parametrize('pool', ['avg','max','avgmax','map','prr'])
def test_pooling_reads_every_patch(pool):
    "Also where it was changed afterwards"
    x = torch.randn(2,3,64,64)
    model = merge_vit(vit(img_size=64, global_pool=pool), 4)
    tokens = restore_vit(copy.deepcopy(model))
    assert model.forward_features(x).shape==tokens.forward_features(x).shape
    later = merge_vit(vit(img_size=64), 4)
    assert later.forward_features(x).shape[1]<17
    later.reset_classifier(5, 'avg')
    assert later.forward_features(x).shape[1]==17 and later(x).shape==(2,5)
    pruned = prune_vit(vit(img_size=64, global_pool=pool), .5, fuse=False)
    kept = trace_patches(pruned, x)[-1]
    dense = pruned.forward_features(x)[:,1:]
    rest = dense.mean(1) if pool=='avg' else None
    if rest is not None: # the average is that of the patches that are left
        left = torch.stack([d[k].mean(0) for d,k in zip(dense, kept)])
        norm = pruned.norm if isinstance(pruned.fc_norm, nn.Identity) else nn.Identity()
        if isinstance(norm, nn.Identity): torch.testing.assert_close(rest, left, atol=1e-5, rtol=1e-5)

def test_importing_a_method_is_light():
    "Neither fastai nor pyplot nor pandas come with the methods themselves"
    script = ("import sys, attn_diversity.tome, attn_diversity.fold, attn_diversity.dynamicvit; "
              "import attn_diversity.pruning; "
              "print([m for m in ('fastai','matplotlib','pandas','sklearn') if m in sys.modules])")
    said = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert said.stdout.strip()=='[]', said.stdout+said.stderr

def test_no_method_is_known_by_name_elsewhere():
    "Outside the table only rows of the paper's own tables and words in texts may say one"
    import re
    from pathlib import Path
    for f in (Path(__file__).parent.parent/'attn_diversity').glob('[!_]*.py'):
        if f.stem in ('methods','indicators','fusion','experiments'): continue # `experiments` holds the paper's rows
        found = re.findall(r"""(?:==|!=|\bin) *\(?['"](?:evit|tome|fold|dynamicvit|medad)['"]""", f.read_text())
        assert not found, (f.name, found)
    assert {'variance','medad','evit','tome','fold','dynamicvit','none'}<=set(METHODS)
