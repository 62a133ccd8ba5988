"""Every family of ViTs, every method: against the maker's model, against slow references that remove nothing,
and what must be refused."""
import copy, json, math, re, warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch
import pytest, timm, torch
import torch.nn.functional as F
from attn_diversity.attention import hear
from attn_diversity.dynamicvit import decisions, dynamic_vit
from attn_diversity.families import find_vit
from attn_diversity.fold import fold_vit
from attn_diversity.overlap import overlap_patches
from attn_diversity.pruning import prune_vit
from attn_diversity.reduce import one_each, ReducedBlock, restore_vit, set_rate, token_counts
from attn_diversity.reduction import Record
from attn_diversity.tome import merge_vit

modules = ('vision_transformer','deit','eva','beit','naflexvit','vision_transformer_hybrid','vision_transformer_relpos',
           'vitamin','vision_transformer_sam')
archs = [n for m in modules for n in timm.list_models(module=m)]
tries = (dict(depth=4, embed_dim=64, num_heads=4), dict(depth=4, embed_dim=64, num_heads=4, num_kv_heads=2),
         dict(depth=4), {})
one_a_family = { # architecture: settings beside the small ones
    'vit_tiny_patch16_224': dict(init_values=.5), 'vit_small_patch14_reg4_dinov2': {},
    'deit_tiny_distilled_patch16_224': {}, 'vit_medium_patch16_gap_240': {},
    'vit_base_patch16_siglip_224': {}, 'vit_base_patch16_rpn_224': {},
    'vit_small_patch16_18x2_224': dict(init_values=.5), 'vit_dpwee_patch16_reg1_gap_256': {},
    'vit_dwee_patch16_reg1_gap_256': {}, 'eva02_tiny_patch14_224': {},
    'vit_small_patch16_dinov3': {}, 'vit_small_patch16_rope_mixed_224': {},
    'vit_pe_core_tiny_patch16_384': {}, 'eva02_enormous_patch14_clip_224': {}, 'beit_base_patch16_224': {},
    'beit3_base_patch16_224': {}, 'vit_relpos_small_patch16_224': {}, 'vit_srelpos_small_patch16_224': {},
    'vit_base_patch16_sapiens2': {}, 'naflexvit_base_patch16_gap': {}, 'vit_tiny_r_s16_p8_224': {},
    'vitamin_small_224': {}}
elsewhere = ('open_clip','Dinov2WithRegisters','DINOv3ViT','SiglipVision','CLIPVision') # of open_clip and transformers

no_init = patch('timm.layers.weight_init._trunc_normal_', lambda tensor, *args: tensor) # it is slow without weights
no_linear_init = patch('torch.nn.Linear.reset_parameters', lambda self: None)

@cache
def sketch(name, **kw):
    "Settings of a model of the same kind, but narrow, with four blocks and few patches; and that model without weights"
    for size in (64, 70, 96):
        for args in (dict(t, img_size=size, **kw) for t in tries):
            try:
                with warnings.catch_warnings(), torch.device('meta'), no_init, no_linear_init:
                    warnings.simplefilter('ignore')
                    model = timm.create_model(name, **args)
            except (AssertionError, TypeError, ValueError, RuntimeError): continue
            if size%getattr(getattr(model, 'patch_embed', None), 'patch_size', (16,))[0]==0: return args, model

def small(name, **kw):
    "That model, shaken so that every parameter matters, and images for it"
    model = shaken(timm.create_model(name, **sketch(name, **kw)[0]))
    side = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or (64,64)
    return model, torch.randn(2, 3, *side)

def make_of(model):
    "All that makes a model but its weights' values: modules, their settings, shapes"
    def said(v): return repr(v) if isinstance(v, (int,float,str,tuple,torch.dtype,type(None))) else type(v).__qualname__
    def row(name, m):
        own = {k: said(v) for k,v in vars(m).items() if not k.startswith('_')}
        return name, type(m), tuple(own.items()), tuple((k, v.shape) for k,v in m.named_parameters(recurse=False))
    return tuple(row(*m) for m in model.named_modules())

def shaken(model):
    torch.manual_seed(0)
    for p in model.eval().requires_grad_(False).parameters(): p.add_(torch.randn_like(p)*.05)
    return model

def one_image(name):
    "A model of this family and a photograph for it, in double"
    if name in one_a_family: model,x = small(name, num_classes=5, **one_a_family[name])
    else:
        x = torch.randn(1,3,64,64)
        if name=='open_clip':
            oc = pytest.importorskip('open_clip')
            model = shaken(oc.transformer.VisionTransformer(64, 8, 48, 4, 4, 2., output_dim=32))
        else:
            T = pytest.importorskip('transformers')
            config = getattr(T, name+'Config')(hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
                                               intermediate_size=96, image_size=64, patch_size=8)
            config.pos_embed_rescale = None # DINOv3 shakes its rotary embeddings in training
            model = shaken(getattr(T, name+'Model')(config))
    return model.double(), x[:1].double()

def answer(model, x): # transformers' models give several things: these are the tokens
    out = model(x)
    return getattr(out, 'last_hidden_state', out)

def overlaps(model, x): # whether patches can be made to
    try: return overlap_patches(model, max(1, int(x.shape[-1]**.5)))(x).isfinite().all()
    except (TypeError, ValueError, NotImplementedError): return False

def test_every_timm_vit():
    """At least 300 of timm's 310 are taken by all methods; rate 1, r 0 and the way back are the maker's to the bit;
    and what the page on compatibility says of them (it is made slowly, one by one) is so"""
    taken,refused,seen = [],[],{} # seen: makes, and whether their patches can overlap
    for name in archs:
        _,drawn = sketch(name, num_classes=5)
        try: find_vit(drawn)
        except TypeError as e:
            assert 'Supported are' in str(e)
            refused.append(name)
            continue
        made = make_of(drawn)
        taken.append(made)
        if made in seen: continue # another size of a model that was tried already
        model,x = small(name, num_classes=5)
        with torch.inference_mode():
            want,keys,classes = model(x),list(model.state_dict()),[type(b) for b in model.blocks]
            for put,none,some in ((prune_vit, 1., .5), (merge_vit, 0, 3), (fold_vit, 0, 3), (dynamic_vit, 1., .5)):
                put(model, none)
                assert torch.equal(model(x), want), name
                assert [k for k in model.state_dict() if not k.startswith('predictors.')]==keys
                assert any(isinstance(b, ReducedBlock) for b in model.blocks)
                out = set_rate(model, some)(x)
                assert out.shape==want.shape and out.isfinite().all() and not torch.equal(out, want), name
                if put is prune_vit:
                    dense = model.forward_intermediates(x, intermediates_only=True)
                    assert all(f.isfinite().all() and f.shape==dense[0].shape for f in dense), name
                restore_vit(model)
                assert torch.equal(model(x), want) and [type(b) for b in model.blocks]==classes, name
            seen[made] = overlaps(model, x)
    assert len(archs)==310 and len(taken)>=300 and len(seen)>100, (len(taken), len(seen), refused)
    assert all('samvit' in n for n in refused), refused
    page = json.loads((Path(__file__).parents[1]/'nbs'/'compatibility.ipynb').read_text())
    said = re.search(r'of (\d+): prune (\d+), merge (\d+), DynamicViT (\d+), dense (\d+), overlap (\d+)',
                     json.dumps(page))
    n = len(taken)
    assert [int(s) for s in said.groups()]==[len(archs), n, n, n, n, sum(bool(seen[m]) for m in taken)]

# ---------------------------------------------------------------- slow references: all tokens stay

@contextmanager
def around(model, run):
    "Each block's forward becomes `run(i, block, its own forward, x, kwargs)`"
    blocks = find_vit(model).blocks
    for i,b in enumerate(blocks):
        own = b.forward
        if 'open_clip' in type(b).__module__: # whose product is made where nobody hears it
            family = find_vit(model).family
            def own(x, b=b, **kw): return family.mlp(b, family.attention(b, x, **kw))
        b.forward = lambda x, *args, i=i, b=b, own=own, **kw: run(
            i, b, own, x, dict(zip(find_vit(model).family.handed, args), **kw))
    try: yield
    finally:
        for b in blocks: del b.__dict__['forward']

def hidden(gone, p):
    "Adds -inf to the columns of what is gone [n]"
    column = torch.zeros(p+len(gone), dtype=torch.double).masked_fill(F.pad(gone, (p,0)), -torch.inf)
    return lambda mask, q, k: column.expand(1,1,1,-1) if mask is None else mask.double()+column

def slow_prune(model, x, keep_rate, stages):
    "Without fusion, one image, in double: a patch that is pruned is hidden from all behind, by a mask"
    _,blocks,_,facts = find_vit(model)
    p,gone = facts.n_prefix,None
    def run(i, block, own, t, kw):
        nonlocal gone
        if gone is None: gone = torch.zeros(t.shape[1]-p, dtype=torch.bool)
        y,heard = hear(lambda: own(t, **kw), change=hidden(gone, p))
        if i in stages:
            rows = []
            for h in heard:
                scale = h.q.shape[-1]**-.5 if h.scale is None else h.scale
                a = (h.q @ h.k.transpose(-2, -1) * scale + h.mask).softmax(-1)
                rows.append(a[0,:,0,p:] if facts.class_token else a[0,:,p:,p:][:,~gone].mean(1))
            score = torch.cat(rows).var(0, unbiased=False).masked_fill(gone, -1)
            k = -(-int(round(keep_rate*1000))*int((~gone).sum())//1000)
            gone = ~torch.zeros_like(gone).index_fill(0, score.topk(k).indices, True)
        if i==len(blocks)-1 and facts.pools: # who reads all patches must not read these
            y = torch.where(F.pad(gone, (p,0))[None,:,None], y[:,p:][:,~gone].mean(1, keepdim=True), y)
        return y
    with around(model, run): out = answer(model, x)
    return out, gone

@pytest.mark.parametrize('name', [*one_a_family, *elsewhere])
def test_pruned_is_masked(name):
    model,x = one_image(name)
    want,gone = slow_prune(copy.deepcopy(model), x, .6, (1,2))
    assert 0<gone.sum()<len(gone)
    prune_vit(model, .6, attention_variance_of_double, blocks=(1,2), fuse=False)
    torch.testing.assert_close(answer(model, x), want, rtol=0, atol=1e-6)

def attention_variance_of_double(a): return a.double().var(1, unbiased=False)

def slow_merge(model, x, choose):
    """One image: a token of s patches is s equal patches, so that nothing has to be weighed.
    `choose(i, groups, heard, prefix)` says which groups of patches there are behind block i."""
    _,_,_,facts = find_vit(model)
    p,groups = facts.n_prefix,None
    def mean(t, dim): # of each group, for all its patches
        t = t.clone().movedim(dim, 0)
        for g in groups: t[g] = t[g].mean(0)
        return t.movedim(0, dim)
    def narrowed(mask, q, k): # a bias that the attention makes: its exponentials are averaged
        if mask is None: return None
        m = mask.double().exp()
        for dim in (-1,-2):
            if m.shape[dim]==1: continue
            m = torch.cat([m.narrow(dim, 0, p), mean(m.narrow(dim, p, m.shape[dim]-p), dim)], dim)
        return m.log()
    def averaged(given): # a rotary table, or a pair of them
        if given is None: return None
        return mean(given.double(), -2) if torch.is_tensor(given) else tuple(map(averaged, given))
    def run(i, block, own, t, kw):
        nonlocal groups
        if groups is None: groups = [[j] for j in range(t.shape[1]-p)]
        family = find_vit(model).family
        kw = {k: averaged(v) if k in family.positions else v for k,v in kw.items()}
        t,heard = hear(lambda: family.attention(block, t, **kw), change=narrowed)
        groups = choose(i, groups, heard, p)
        t = torch.cat([t[:,:p], mean(t[:,p:], 1)], 1)
        return family.mlp(block, t)
    with around(model, run): out = answer(model, x)
    return out, groups

def keys_of(heard, groups, p): # one direction a group
    keys = F.normalize(torch.cat([h.k for h in heard], 1)[0].float().mean(0)[p:], dim=-1)
    return keys[[g[0] for g in groups]]

def tome_by_loops(rs):
    def choose(i, groups, heard, p):
        if not rs[i]: return groups
        keys = keys_of(heard, groups, p)
        A = [j for j in range(len(groups)) if (p+j)%2==0]
        B = [j for j in range(len(groups)) if (p+j)%2==1]
        edges = [(max((float(keys[a]@keys[b]), b) for b in B), a) for a in A]
        groups = [list(g) for g in groups]
        for (_,b),a in sorted(edges, reverse=True)[:min(rs[i], len(groups)//2)]:
            groups[b] = groups[b]+groups[a]
            groups[a] = None
        return [groups[a] for a in A if groups[a]] + [groups[b] for b in B]
    return choose

@pytest.mark.parametrize('name', [*one_a_family, *elsewhere])
def test_tome_is_its_slow_transcription(name):
    "Some blocks merge, others only carry sizes"
    model,x = one_image(name)
    r = [2,0,3,0] if len(find_vit(model).blocks)==4 else 2
    rs = one_each(r, len(find_vit(model).blocks), 'r')
    want,groups = slow_merge(copy.deepcopy(model), x, tome_by_loops(rs))
    merge_vit(model, r)
    assert len(groups)==token_counts(model, sum(map(len, groups)))[-1]
    torch.testing.assert_close(answer(model, x), want, rtol=0, atol=1e-5)

def fold_by_loops(rs, lam, facts):
    def choose(i, groups, heard, p):
        keys,n = keys_of(heard, groups, p),len(groups)
        k = n-min(rs[i], n//2)
        if k==n: return groups
        looked_at = [len(g)-1e-4*j/max(n-1, 1) for j,g in enumerate(groups)] # of equal ones the first
        if facts.class_token: # at a group as a whole: each of its patches is one of s equal ones
            at = torch.cat([torch.einsum('hd,hnd->hn', h.q[0,:,0], h.k[0])*(h.scale or h.q.shape[-1]**-.5)
                            for h in heard])
            mean = at.softmax(-1).mean(0)[p:]
            looked_at = [float(mean[g].sum()) for g in groups]
        order = sorted(range(n), key=lambda j: -looked_at[j])
        rank = {j: o for o,j in enumerate(order)}
        price = {a: looked_at[a]**lam*(1-max((float(keys[a]@keys[b]) for b in range(n) if rank[b]<rank[a]), default=-2))
                 for a in range(n)}
        gone = sorted(order, key=price.get)[:n-k]
        stay = [j for j in order if j not in gone]
        new = {j: list(groups[j]) for j in stay}
        for a in gone: new[max(stay, key=lambda b: float(keys[a]@keys[b]))] += groups[a]
        return list(new.values())
    return choose

@pytest.mark.parametrize('name,stages', [*((n, False) for n in (*one_a_family, *elsewhere)),
                                         ('vit_small_patch16_dinov3',True), ('vit_medium_patch16_gap_240',True)])
def test_fold_is_its_slow_transcription(name, stages):
    "A few in each block, or the paper's stages"
    model,x = one_image(name)
    depth,facts = len(find_vit(model).blocks),find_vit(model).facts
    r = [2,0,3,1] if depth==4 else [2]*depth
    if stages: # as many as keep rate 0.7 leaves in blocks 1 and 2
        n = facts.n_patches
        k = math.ceil(.7*n)
        r = [0, n-k, k-math.ceil(.7*k), 0]
    want,groups = slow_merge(copy.deepcopy(model), x, fold_by_loops(r, .5, facts))
    fold_vit(model, **(dict(keep_rate=.7, blocks=(1,2)) if stages else dict(r=r)))
    assert sorted(j for g in groups for j in g)==list(range(sum(map(len, groups)))) # each patch in one token
    assert len(groups)==token_counts(model, sum(map(len, groups)))[-1]
    torch.testing.assert_close(answer(model, x), want, rtol=0, atol=1e-5)

def test_a_wrong_gather_is_seen(monkeypatch):
    "The first rows of a rotary table instead of those that were kept"
    model,x = one_image('vit_small_patch16_dinov3')
    want,_ = slow_prune(copy.deepcopy(model), x, .6, (1,2))
    prune_vit(model, .6, attention_variance_of_double, blocks=(1,2), fuse=False)
    def first_rows(self, given):
        if given is None or not self.reductions: return given
        return given[...,:self.reductions[-1].kept.shape[1],:]
    monkeypatch.setattr(Record, 'positions', first_rows)
    monkeypatch.setattr(Record, '_known', lambda self, given: None)
    assert (model(x)-want).abs().max()>1e-3

@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224','vit_medium_patch16_gap_240','open_clip',
                                  'DINOv3ViT'])
def test_dynamicvit_trains_as_it_is_masked(name):
    "In training nothing is removed: the same as a model whose dropped patches are hidden by a mask"
    model,x = one_image(name)
    p,want = find_vit(model).facts.n_prefix,copy.deepcopy(model)
    dynamic_vit(model, .6, blocks=(1,2))
    with torch.no_grad():
        for w in model.predictors.parameters(): w.add_(torch.randn_like(w)*.3)
    model.train().predictors.double()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.eval()
    torch.manual_seed(1)
    with decisions(model) as kept: got = answer(model, x)
    gone = [k[0]<.5 for k in kept]
    assert gone[-1].any() and not gone[-1].all()
    def run(i, block, own, t, kw):
        if i==0: return own(t, **kw)
        family,out = find_vit(want).family,gone[min(i-1, 1)]
        column = hidden(out, p)
        def but_itself(mask, q, k):
            m = column(mask, q, k).expand(1, 1, k.shape[-2], -1).clone()
            return m.diagonal_scatter(torch.zeros_like(m.diagonal(dim1=-2, dim2=-1)), dim1=-2, dim2=-1)
        t = family.mlp(block, hear(lambda: family.attention(block, t, **kw), change=but_itself)[0])
        if i==3 and find_vit(want).facts.pools:
            t = torch.where(F.pad(out, (p,0))[None,:,None], t[:,p:][:,~out].mean(1, keepdim=True), t)
        return t
    with around(want, run): torch.testing.assert_close(got, answer(want, x), rtol=0, atol=1e-6)
