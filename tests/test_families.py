"""Every family of ViTs, every method: against the maker's model, against slow references that remove nothing,
and what must be refused."""
import copy, warnings
from contextlib import contextmanager
import pytest, timm, torch
import torch.nn.functional as F
from attn_diversity.attention import hear
from attn_diversity.dynamicvit import dynamic_vit
from attn_diversity.families import find_vit
from attn_diversity.pruning import prune_vit
from attn_diversity.reduce import ReducedBlock, restore_vit, set_rate, token_counts
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

def small(name, **kw):
    "A model of the same kind, shaken so that every parameter matters: narrow, four blocks, few patches"
    def fits(args):
        try:
            with warnings.catch_warnings(), torch.device('meta'):
                warnings.simplefilter('ignore')
                embed = getattr(timm.create_model(name, **args), 'patch_embed', None)
            return args['img_size']%getattr(embed, 'patch_size', (16,))[0]==0
        except (AssertionError, TypeError, ValueError, RuntimeError): return False
    args = next(a for size in (64, 70, 96) for t in tries if fits(a := dict(t, img_size=size, **kw)))
    model = timm.create_model(name, **args).eval().requires_grad_(False)
    torch.manual_seed(0)
    for p in model.parameters(): p.add_(torch.randn_like(p)*.05)
    side = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or (64,64)
    return model, torch.randn(2, 3, *side)

def test_every_timm_vit():
    "At least 300 of timm's 310 are taken by all three methods; rate 1, r 0 and the way back are the maker's to the bit"
    taken,refused = [],[]
    for name in archs:
        model,x = small(name, num_classes=5)
        try: find_vit(model)
        except TypeError as e:
            assert 'Supported are' in str(e)
            refused.append(name)
            continue
        with torch.inference_mode():
            want,keys,classes = model(x),list(model.state_dict()),[type(b) for b in model.blocks]
            for put,none,some in ((prune_vit, 1., .5), (merge_vit, 0, 3), (dynamic_vit, 1., .5)):
                put(model, none)
                assert torch.equal(model(x), want), name
                assert [k for k in model.state_dict() if not k.startswith('predictors.')]==keys
                assert any(isinstance(b, ReducedBlock) for b in model.blocks)
                out = set_rate(model, some)(x)
                assert out.shape==want.shape and out.isfinite().all() and not torch.equal(out, want), name
                restore_vit(model)
                assert torch.equal(model(x), want) and [type(b) for b in model.blocks]==classes, name
        taken.append(name)
    assert len(archs)==310 and len(taken)>=300, (len(taken), refused)
    assert all('samvit' in n for n in refused), refused

# ---------------------------------------------------------------- slow references: all tokens stay

@contextmanager
def around(model, run):
    "Each block's forward becomes `run(i, block, its own forward, x, kwargs)`"
    for i,b in enumerate(model.blocks):
        own = b.forward
        b.forward = lambda x, *args, i=i, b=b, own=own, **kw: run(
            i, b, own, x, dict(zip(find_vit(model).family.handed, args), **kw))
    try: yield
    finally:
        for b in model.blocks: del b.__dict__['forward']

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
    with around(model, run): out = model(x)
    return out, gone

@pytest.mark.parametrize('name', one_a_family)
def test_pruned_is_masked(name):
    model,x = small(name, num_classes=5, **one_a_family[name])
    model,x = model.double(),x[:1].double()
    want,gone = slow_prune(copy.deepcopy(model), x, .6, (1,2))
    assert 0<gone.sum()<len(gone)
    prune_vit(model, .6, attention_variance_of_double, blocks=(1,2), fuse=False)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)

def attention_variance_of_double(a): return a.double().var(1, unbiased=False)

def slow_tome(model, x, r):
    "One image: a token of s patches is s equal patches, so that nothing has to be weighed; matching by loops"
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
    def run(i, block, own, t, kw):
        nonlocal groups
        if groups is None: groups = [[j] for j in range(t.shape[1]-p)]
        if kw.get('rope') is not None: kw = dict(kw, rope=mean(kw['rope'].double(), -2))
        family = find_vit(model).family
        t,heard = hear(lambda: family.attention(block, t, **kw), change=narrowed)
        keys = F.normalize(torch.cat([h.k for h in heard], 1)[0].float().mean(0)[p:], dim=-1)
        A = [j for j in range(len(groups)) if (p+j)%2==0]
        B = [j for j in range(len(groups)) if (p+j)%2==1]
        edges = [(max((float(keys[groups[a][0]]@keys[groups[b][0]]), b) for b in B), a) for a in A]
        for (_,b),a in sorted(edges, reverse=True)[:min(r, len(groups)//2)]:
            groups[b] = groups[b]+groups[a]
            groups[a] = None
        groups = [groups[a] for a in A if groups[a]] + [groups[b] for b in B]
        t = torch.cat([t[:,:p], mean(t[:,p:], 1)], 1)
        return family.mlp(block, t)
    with around(model, run): out = model(x)
    return out, groups

@pytest.mark.parametrize('name', one_a_family)
def test_tome_is_its_slow_transcription(name):
    model,x = small(name, num_classes=5, **one_a_family[name])
    model,x = model.double(),x[:1].double()
    want,groups = slow_tome(copy.deepcopy(model), x, 2)
    merge_vit(model, 2)
    assert len(groups)==token_counts(model, sum(map(len, groups)))[-1]
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)

def test_a_wrong_gather_is_seen(monkeypatch):
    "The first rows of a rotary table instead of those that were kept"
    model,x = small('vit_small_patch16_dinov3', num_classes=5)
    model,x = model.double(),x[:1].double()
    want,_ = slow_prune(copy.deepcopy(model), x, .6, (1,2))
    prune_vit(model, .6, attention_variance_of_double, blocks=(1,2), fuse=False)
    def first_rows(self, given):
        if given is None or not self.reductions: return given
        return given[...,:self.reductions[-1].kept.shape[1],:]
    monkeypatch.setattr(Record, 'positions', first_rows)
    monkeypatch.setattr(Record, '_known', lambda self, given: None)
    assert (model(x)-want).abs().max()>1e-3
