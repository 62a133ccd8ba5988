"""Properties of the core, tried by hypothesis on shapes, prefix tokens, masks, precisions and settings of any kind.
`PROPERTIES=100 pytest tests/test_properties.py` tries 100 times as many examples, other ones in each run."""
import copy, math, os, pickle
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple
import numpy as np, pytest, torch
from hypothesis import assume, example, given, HealthCheck, settings, strategies as st
from scipy import special, stats
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn
from attn_diversity.attention import class_attention, received_attention
from attn_diversity.dynamicvit import checked_rate, decisions, floor_count
from attn_diversity.families import find_vit
from attn_diversity.fold import fold_tokens
from attn_diversity.fusion import fuse_tokens, fusion_weights, get_temperature
from attn_diversity.indicators import get_indicator, INDICATORS
from attn_diversity.measure import count_flops
from attn_diversity.methods import match_flops, METHODS, method_config, reduce_vit, twin_of
from attn_diversity.overlap import overlap_patches
from attn_diversity.pruning import kept_count
from attn_diversity.reduce import (block_ids, dense, one_each, reducers_of, restore_vit, scatter_back, set_rate,
                                   token_counts, trace, trace_records)
from attn_diversity.reduction import Record, Reduction
from attn_diversity.tome import checked_r, falling_r, match_tokens, merging

MORE = int(os.environ.get('PROPERTIES', 0))

def tries(n): # examples in the quick run; always the same ones
    return settings(max_examples=n*max(MORE, 1), derandomize=not MORE, deadline=None, database=None, print_blob=True,
                    suppress_health_check=list(HealthCheck))

seeds = st.integers(0, 2**20)
rates = st.one_of(st.integers(1, 1000).map(lambda k: k/1000), st.floats(1e-6, 1))

# ---------------------------------------------------------------- models

def _vit(maker=VisionTransformer, **own):
    return lambda **kw: maker(patch_size=8, num_classes=5, mlp_ratio=2, **kw, **own)

KINDS = dict(
    plain=_vit(), registers=_vit(reg_tokens=3, init_values=.5), mean=_vit(global_pool='avg'),
    gap=_vit(class_token=False, global_pool='avg'),
    gap_register=_vit(class_token=False, reg_tokens=1, global_pool='avg'),
    eva=_vit(Eva, qkv_fused=False), rotary=_vit(Eva, use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=2),
    mixed=_vit(Eva, use_rot_pos_emb=True, rope_type='mixed', class_token=False),
    postnorm=_vit(block_fn=ResPostBlock), parallel=_vit(block_fn=ParallelScalingBlock),
    relpos=_vit(VisionTransformerRelPos))
biased = ('relpos',) # hand no mask to their blocks

class Case(NamedTuple):
    "All that a model depends on"
    kind:str
    grid:tuple # rows and columns of patches
    heads:int
    depth:int
    dtype:torch.dtype
    seed:int
    method:str
    given:tuple # settings of the method, as pairs

    @property
    def n(self): return math.prod(self.grid)

    def plain(self): return _made(self.kind, self.grid, self.heads, self.depth, self.dtype, self.seed)

    def model(self):
        model = reduce_vit(copy.deepcopy(self.plain()), self.method, **dict(self.given))
        torch.manual_seed(self.seed+1)
        with torch.no_grad():
            for p in getattr(model, 'predictors', nn.Module()).parameters(): p.add_(torch.randn_like(p)*.3)
        return model.eval()

    def images(self, n, seed):
        torch.manual_seed(seed)
        return torch.randn(n, 3, *(8*g for g in self.grid)).to(self.dtype)

@lru_cache(64)
def _made(kind, grid, heads, depth, dtype, seed):
    torch.manual_seed(seed)
    size = tuple(8*g for g in grid)
    model = KINDS[kind](img_size=size, embed_dim=8*max(heads, 2), depth=depth, num_heads=heads)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    return model.to(dtype).eval()

def one_or_each(of, n): return st.one_of(of, st.lists(of, min_size=n, max_size=n).map(tuple))

any_grid = st.tuples(st.integers(1, 5), st.integers(1, 5))

@st.composite
def cases(draw, kinds=tuple(KINDS), methods=tuple(m for m in METHODS if m!='none'), heads=(1,2,3,4),
          dtypes=(torch.float32,torch.float64,torch.bfloat16), grids=any_grid):
    depth = draw(st.integers(2, 4))
    blocks = draw(st.one_of(st.none(), st.lists(st.integers(0, depth-1), min_size=1, unique=True).map(tuple)))
    method = draw(st.sampled_from(methods))
    stages = len({depth*i//4 for i in (1,2,3)}) if blocks is None else len(blocks)
    rate,r = one_or_each(rates, stages),st.integers(0, 14)
    chosen = dict(blocks=blocks)
    if method=='tome': chosen = dict(r=draw(one_or_each(r, depth)))
    elif method=='fold':
        if draw(st.booleans()): chosen.update(keep_rate=draw(rate))
        else: chosen.update(r=draw(one_or_each(r, depth if blocks is None else stages)))
        chosen.update(indicator=draw(st.sampled_from([None,'size',*INDICATORS])), lam=draw(st.sampled_from([0,.5,4.])))
    else: chosen.update(keep_rate=draw(rate))
    if 'fuse' in METHODS[method].settings:
        tau = st.sampled_from([None,1e-30,1e-3,math.inf])
        chosen.update(fuse=draw(st.sampled_from([True,'raw',False])), temperature=draw(tau))
    return Case(draw(st.sampled_from(kinds)), draw(grids), draw(st.sampled_from(heads)), depth,
                draw(st.sampled_from(dtypes)), draw(st.integers(0, 5)), method, tuple(chosen.items()))

class Mask(NamedTuple):
    "An attention mask of some shape and kind"
    seed:int
    share:float # hidden
    several:tuple # whether images, heads and queries have their own
    added:bool

    def of(self, n, heads, tokens):
        torch.manual_seed(self.seed)
        shape = [k if own else 1 for k,own in zip((n,heads,tokens), self.several)]
        seen = torch.rand(*shape, tokens)>=self.share
        if not self.added: return seen
        return (torch.randn(seen.shape)*2).masked_fill(~seen, -torch.inf)

masks = st.one_of(st.none(), st.builds(Mask, seeds, st.sampled_from([0.,.3,.9,1.]), st.tuples(*[st.booleans()]*3),
                                       st.booleans()))

# patches that a mask hides tie: which of them stay is no matter of their order
masks_that_hide_nothing = st.one_of(st.none(), st.builds(Mask, seeds, st.just(0.), st.tuples(*[st.booleans()]*3),
                                                         st.booleans()))

def mask_for(case, mask, batch):
    "The mask as a tensor; None where the family or the method takes none"
    if mask is None or case.kind in biased or case.method in ('tome','fold'): return None
    m = mask.of(batch, case.heads, case.plain().num_prefix_tokens+case.n)
    return m.to(case.dtype) if mask.added else m

def run(model, x, mask=None):
    kw = {} if mask is None else dict(attn_mask=mask)
    return model.forward_head(model.forward_features(x, **kw))

def listen(model, go):
    "What `go()` returns, and (the record that it had before it, the reduction) of each block that reduces"
    found = []
    hooks = [r.register_forward_hook(lambda m, args, out: found.append((args[1],out)))
             for r in reducers_of(model).values()]
    try: return go(), found
    finally:
        for h in hooks: h.remove()

def record_of(case, found): # behind all blocks
    return Record(case.n, case.plain().num_prefix_tokens, tuple(r for _,r in found))

# ---------------------------------------------------------------- properties of models

@torch.no_grad()
def holds_together(record, r, averages):
    "One reduction of n tokens to m: where each goes, with what weight"
    batch,k = r.kept.shape
    n = k + (r.gone.shape[1] if r.gone is not None else 0)
    if r.gone is not None: # each exactly once
        assert (torch.cat([r.kept,r.gone], 1).sort(1).values==torch.arange(n)).all()
    else:
        n = record.n if not record.reductions else record.reductions[-1].kept.shape[1]
        assert all(len(set(row.tolist()))==k and 0<=min(row) and max(row)<n for row in r.kept)
    w = r.tokens(torch.eye(n).expand(batch, n, n)) # [B, m, n]: of what each token is made
    assert w.isfinite().all() and w.shape==(batch, k+r.extra, n)
    if averages: torch.testing.assert_close(w.sum(2), torch.ones(batch, k+r.extra), rtol=0, atol=1e-5)
    if r.into is not None: # sizes weigh: each patch has weight 1 over all tokens
        size = torch.ones(batch, n) if record.size is None else record.size
        new = r.sizes(size)
        torch.testing.assert_close((new.unsqueeze(2)*w).sum(1), size, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new.sum(1), torch.full((batch,), float(record.n)), rtol=1e-5, atol=0)
    else: # what is kept is itself, and what is not is in the fusion token alone
        itself = torch.zeros_like(w[:,:k]).scatter_(2, r.kept.unsqueeze(2), 1.)
        assert torch.equal(w[:,:k], itself)
        if r.extra: assert (w[:,k].gather(1, r.kept)==0).all()
    return w

def owners_by_loops(n, reductions, image):
    "For each patch its token, or -1"
    groups = [[i] for i in range(n)]
    for r in reductions:
        gone = [] if r.gone is None else r.gone[image].tolist()
        new = [list(groups[i]) for i in r.kept[image].tolist()]
        if r.extra: new.append([i for g in gone for i in groups[g]])
        elif r.into is not None:
            for g,j in zip(gone, r.into[image].tolist()): new[j] += groups[g]
        groups = new
    return [next((j for j,g in enumerate(groups) if i in g), -1) for i in range(n)]

@tries(50)
@given(cases(), masks, st.integers(1, 3), seeds)
def test_every_patch_is_somewhere_once(case, mask, batch, seed):
    "Conservation, for each reduction by itself and for all together; and every patch's features are its token's"
    model,x = case.model(),case.images(batch, seed)
    with torch.no_grad(): y,found = listen(model, lambda: run(model, x, mask_for(case, mask, batch)))
    raw = dict(case.given).get('fuse')=='raw' or case.method=='evit'
    ws = [holds_together(before, r, not raw) for before,r in found]
    record = record_of(case, found)
    owners = record.owners()
    assert owners.expand(batch, -1).tolist()==[owners_by_loops(case.n, record.reductions, i) for i in range(batch)]
    m = owners.max()+1
    if case.method in ('tome','fold') and ws: # a token is the mean of its patches
        all_together = ws[0]
        for w in ws[1:]: all_together = w @ all_together
        mine = nn.functional.one_hot(owners, int(m)).transpose(1, 2).float()
        torch.testing.assert_close(all_together, mine/mine.sum(2, keepdim=True), rtol=1e-4, atol=1e-5)
    if found and found[-1][1].into is None:
        for ids,own in zip(record.ids().tolist(), owners.tolist()):
            assert all(own[p]==j for j,p in enumerate(ids) if p>=0)
    tokens = torch.randn(batch, record.n_prefix+int(m), 2)
    whole = dense(tokens, record, fill='zero')
    for i,row in enumerate(owners.expand(batch, -1).tolist()):
        want = torch.stack([tokens[i,record.n_prefix+o] if o>=0 else torch.zeros(2) for o in row])
        assert torch.equal(whole[i,record.n_prefix:], want)
    assert torch.equal(whole[:,record.n_prefix:], scatter_back(tokens[:,record.n_prefix:], owners))

@tries(40)
@given(cases(), st.integers(1, 2), seeds)
def test_as_many_tokens_as_predicted(case, batch, seed):
    model,x = case.model(),case.images(batch, seed)
    records,reducers = trace_records(model, x),reducers_of(model)
    got = [case.n]+[(r.reductions[-1].kept.shape[1]+r.reductions[-1].extra if r.reductions else case.n)
                    for r in records.values()]
    assert got==token_counts(model)==token_counts(model, case.n)
    assert [int(o.max())+1 for o in trace(model, x)]==got[1:]
    want,share = [case.n],Fraction(1)
    for r in reducers.values(): # as the papers say it
        n,exact = want[-1],Fraction(str(getattr(r, 'keep_rate', 1)))
        if case.method=='dynamicvit':
            share *= exact
            k = min(n, max(1, math.floor(share*case.n+Fraction(1, 10**9))))
        elif r.knob=='r': k = n-min(r.r, n//2)
        else: k = max(1, math.ceil(exact*n-Fraction(1, 10**9)))
        want.append(k+(k<n and bool(getattr(r, 'fuse', False))))
    assert got==want
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[2:]==case.grid
    assert token_counts(set_rate(model, [getattr(r, r.knob) for r in reducers.values()]))==got

@tries(5)
@given(cases(kinds=('plain','registers','gap'), dtypes=(torch.float32,)))
def test_gflops_follow_the_tokens(case):
    "The MLP costs 4C² a token (its ratio is 2) and block, of the tokens that are left behind the block's attention"
    model = case.model()
    left,now,reducers = [],case.n,reducers_of(model)
    for i in range(case.depth):
        if i in reducers: now = reducers[i].left(now, case.n)
        left.append(now+model.num_prefix_tokens)
    width = model.embed_dim
    assert count_flops(model).parts['MLP']*1e9==pytest.approx(sum(left)*4*width**2, rel=1e-6)

@tries(40)
@given(cases(), masks, st.integers(1, 2), seeds)
def test_nothing_to_do_is_the_makers_model(case, mask, batch, seed):
    "Keep rate 1 and r 0, to the bit, and the way back from any other"
    plain,model,x,m = case.plain(),case.model(),case.images(batch, seed),mask_for(case, mask, batch)
    keys = [k for k in model.state_dict() if not k.startswith('predictors.')]
    with torch.no_grad():
        want = run(plain, x, m)
        set_rate(model, 0 if next(iter(reducers_of(model).values())).knob=='r' else 1)
        assert torch.equal(run(model, x, m), want) or want.isnan().any()
        assert torch.equal(model(x), plain(x))
        inner = model.forward_intermediates(x, intermediates_only=True)
        assert all(map(torch.equal, inner, plain.forward_intermediates(x, intermediates_only=True)))
        assert keys==list(plain.state_dict())
        restored = restore_vit(case.model())
        assert torch.equal(run(restored, x, m), want) and list(restored.state_dict())==keys
        assert [type(b) for b in restored.modules()]==[type(b) for b in plain.modules()]

@tries(25)
@given(cases(), masks, st.integers(1, 2), seeds)
def test_copies_are_the_same_to_the_bit(case, mask, batch, seed):
    model,x,m = case.model(),case.images(batch, seed),mask_for(case, mask, batch)
    loaded = copy.deepcopy(case.plain())
    for p in loaded.parameters(): nn.init.zeros_(p.detach())
    config = method_config(model)
    loaded = reduce_vit(loaded, **config).eval()
    loaded.load_state_dict(model.state_dict())
    def answer(other):
        torch.manual_seed(seed) # of random pruning
        with torch.no_grad(): return run(other, x, m)
    want = answer(model)
    knobs = [getattr(r, r.knob) for r in reducers_of(model).values()]
    there = set_rate(copy.deepcopy(model), 1 if isinstance(knobs[0], int) else .4)
    with torch.no_grad(): run(there, x, m)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin_of(model), set_rate(there, knobs), loaded
    for other in (model, *others):
        assert torch.equal(answer(other), want) and method_config(other)==config

def noisy(t, seed):
    torch.manual_seed(seed)
    return t*(1+1e-5*torch.randn_like(t))

def sure(model, go, x, seed, record):
    """`go(x)` and its owners, where a little noise does not change the owners: no two tokens nearly tie;
    and by how much the answer may differ"""
    y,found = listen(model, lambda: go(x))
    owners,apart = record(found).owners(),1e-5
    for k in range(3):
        other,again = listen(model, lambda: go(noisy(x, seed+k)))
        assume(torch.equal(record(again).owners(), owners))
        apart = max(apart, float((other-y).abs().max()))
    return y, owners, apart

exact = dict(dtypes=(torch.float32,torch.float64), heads=(2,3,4)) # the variance of one head is 0 for each patch

@tries(35)
@given(cases(**exact, methods=[m for m in METHODS if m not in ('none','random')]), masks, st.integers(2, 3), seeds)
@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(case, mask, batch, seed):
    assume(dict(case.given).get('indicator')!='random')
    model,x,m = case.model(),case.images(batch, seed),mask_for(case, mask, batch)
    y,owners,apart = sure(model, lambda x: run(model, x, m), x, seed, lambda found: record_of(case, found))
    for i in range(batch):
        own = m if m is None or len(m)==1 else m[i:i+1]
        one,found = listen(model, lambda: run(model, x[i:i+1], own))
        assert torch.equal(record_of(case, found).owners().expand(1, -1)[0], owners.expand(batch, -1)[i])
        torch.testing.assert_close(one[0], y[i], rtol=0, atol=apart)

def through_blocks(model, tokens, rope, mask):
    kw = {} if mask is None else dict(attn_mask=mask)
    if rope is not None: kw['rope'] = rope
    for b in model.blocks: tokens = b(tokens, **kw)
    return tokens

def shuffled(t, dims, order): # a mask; a dimension of 1 stays
    for d in dims: t = t if t.shape[d]==1 else t.index_select(d, order)
    return t

@tries(45)
@given(cases(**exact, kinds=[k for k in KINDS if k not in ('relpos','mixed')],
             methods=[m for m in METHODS if m not in ('none','random')]), masks_that_hide_nothing, seeds)
@torch.no_grad()
def test_patches_in_another_order(case, mask, seed):
    "With their positions: the same owners, and the same features. ToMe: within even and odd places, in one block"
    own = dict(case.given)
    assume(own.get('indicator') not in ('random','size'))
    assume(case.method!='fold' or own.get('indicator') is not None or not case.kind.startswith('gap'))
    if case.method=='tome': case = case._replace(given=(('r', (4,)+(0,)*(case.depth-1)),))
    model,p,batch = case.model(),case.plain().num_prefix_tokens,2
    m = mask_for(case, mask, batch)
    torch.manual_seed(seed)
    tokens = torch.randn(batch, p+case.n, model.embed_dim, dtype=case.dtype)
    rope = model.rope.get_embed(case.grid) if case.kind=='rotary' else None
    order = torch.randperm(case.n)
    if case.method=='tome':
        order = torch.arange(case.n)
        for first in (0,1): order[first::2] = order[first::2][torch.randperm(len(order[first::2]))]
    whole = torch.cat([torch.arange(p), p+order])
    pools = find_vit(model).facts.pools
    def go(t): return through_blocks(model, t, rope, m)
    y,owners,apart = sure(model, go, tokens, seed, lambda found: record_of(case, found))
    other,found = listen(model, lambda: through_blocks(
        model, tokens[:,whole], None if rope is None else rope[order],
        None if m is None else shuffled(m, (2,3), whole)))
    again = record_of(case, found).owners()
    if owners.shape[0]==1: # nothing was reduced
        y,other = y[:,whole],other
    else:
        if case.method=='tome': # tokens are in the order of their patches
            together = owners.unsqueeze(2)==owners.unsqueeze(1)
            assert torch.equal(again.unsqueeze(2)==again.unsqueeze(1), together[:,order][:,:,order])
        else: assert torch.equal(again, owners[:,order])
        if not pools:
            y = dense(y, Record(case.n, p, tuple(r for _,r in listen(model, lambda: go(tokens))[1])))
            other = dense(other, record_of(case, found))
        y = y[:,whole]
    torch.testing.assert_close(other, y, rtol=0, atol=apart)

pictures = st.sampled_from(['noise','large','tiny','black','flat','two patches'])

def picture(case, batch, seed, what):
    x = case.images(batch, seed)
    if what=='flat': return torch.full_like(x, .3)
    if what=='two patches': # each many times: ties
        x = x[...,:8,:8].repeat(1, 1, *case.grid)
        x[...,:8,:8] = -x[...,:8,:8]
        return x
    return x*dict(noise=1, large=1e4, tiny=1e-6, black=0)[what]

@tries(50)
@given(cases(dtypes=(torch.float32,torch.float64,torch.bfloat16,torch.float16)), masks, st.integers(1, 2), seeds,
       pictures, st.booleans(), st.booleans())
def test_finite_in_finite_out(case, mask, batch, seed, what, training, auto):
    "Values, and gradients of pixels and weights, where the maker's model has finite ones"
    m = mask_for(case, mask, batch)
    def all_of(model):
        x = picture(case, batch, seed, what).requires_grad_()
        torch.manual_seed(seed)
        with torch.autocast('cpu', torch.bfloat16, auto and case.dtype==torch.float32):
            y = run(model.train(training), x, m)
        y.square().mean().backward()
        grads = {n: p.grad for n,p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return [n for n,t in dict(grads, x=x.grad, y=y).items() if not t.isfinite().all()]
    assume(not all_of(copy.deepcopy(case.plain())))
    model = case.model()
    assert not all_of(model)
    if case.method=='dynamicvit' and training:
        with decisions(model) as kept, torch.no_grad(): run(model, picture(case, batch, seed, what), m)
        assert len(kept)==len(reducers_of(model))
        assert all(((k==0)|(k==1)).all() and k.shape==(batch,case.n) for k in kept)
        assert all((later<=former).all() for former,later in zip(kept, kept[1:])) # what is dropped stays dropped

@tries(2)
@given(cases(kinds=('plain','gap','registers'), dtypes=(torch.float32,), grids=st.sampled_from([(1,3),(2,3),(3,3)])),
       st.floats(0, .95))
def test_match_flops_comes_closest(case, where):
    """No other value of the knob comes nearer to what was asked for, but for what it costs to make a fusion token:
    of as many tokens one may be such, or none"""
    row,plain = METHODS[case.method],case.plain()
    own = {k: v for k,v in case.given if k in row.settings and v is not None and k!='keep_rate'}
    model = row(twin_of(plain), **own).eval()
    first = next(iter(reducers_of(model).values()))
    costs = {}
    for v in first.values(case.n):
        key = tuple(token_counts(set_rate(model, v)))
        if key not in costs: costs[key] = float(count_flops(model))
    asked = min(costs.values())*(1-where)+max(costs.values())*where
    found = match_flops(plain, asked, row, **own)
    got = float(count_flops(row(twin_of(plain), **own, **found)))
    best = min(costs.values(), key=lambda c: abs(c-asked))
    assert abs(got-asked)<=abs(best-asked)+.01*asked, (asked, got, best)

# ---------------------------------------------------------------- attention and indicators

@tries(60)
@given(st.tuples(*[st.integers(1, 5)]*4), st.integers(0, 2), masks, st.sampled_from([None,.3]),
       st.integers(1, 4), seeds)
def test_rows_of_attention(shape, p, mask, scale, rows, seed):
    "Against the whole matrix in double; a row that may see nothing is finite"
    b,h,n,d = shape
    n += p
    torch.manual_seed(seed)
    q,k = torch.randn(2, b, h, n, d)
    m = None if mask is None else mask.of(b, h, n)
    a = q.double() @ k.double().transpose(-2, -1) * (d**-.5 if scale is None else scale)
    if m is not None: a = a.masked_fill(~m, -torch.inf) if m.dtype==torch.bool else a+m.double()
    a = a.softmax(-1)
    got = class_attention(q, k, m, scale)
    blind = a[:,:,0].isnan()
    torch.testing.assert_close(got[~blind].double(), a[:,:,0][~blind], rtol=1e-4, atol=1e-5)
    received = received_attention(q, k, m, scale, p, rows)
    for t in (got, received):
        assert t.isfinite().all() and t.dtype==torch.float32
        torch.testing.assert_close(t.sum(-1), torch.ones(b, h), rtol=0, atol=1e-5)
    if not a.isnan().any(): torch.testing.assert_close(received.double(), a[:,:,p:].mean(2), rtol=1e-4, atol=1e-5)

@tries(60)
@given(st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 9)), seeds, st.floats(.1, 30),
       st.sampled_from([torch.float32,torch.float64,torch.bfloat16]))
def test_indicators_are_those_of_numpy_and_scipy(shape, seed, sharp, dtype):
    torch.manual_seed(seed)
    a = (torch.randn(shape)*sharp).softmax(-1).to(dtype)
    x = a.float().numpy()
    want = dict(mean=x.mean(1), variance=x.var(1), medad=stats.median_abs_deviation(x, axis=1))
    for name,expected in want.items():
        got = INDICATORS[name](a)
        assert got.dtype==torch.float32 and got.shape==(shape[0],shape[2])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
        shuffled_heads = INDICATORS[name](a[:,torch.randperm(shape[1])])
        torch.testing.assert_close(shuffled_heads, got, rtol=1e-4, atol=1e-7)
    assert INDICATORS['random'](a).shape==(shape[0],shape[2])

# ---------------------------------------------------------------- pure functions

@tries(200)
@given(st.one_of(st.integers(1, 100_000), st.integers(1, 100).map(lambda n: 100*n)), st.integers(1, 1000),
       st.integers(0, 1000))
@example(100, 70, 0) # .07*100 is 7.000000000000001
@example(100, 290, 0) # .29*100 is 28.999999999999996
def test_counts_of_a_rate(n, k, more):
    "Decimals are what they look like: ceil and floor of the exact product"
    exact_share = Fraction(k, 1000)
    assert kept_count(n, k/1000)==math.ceil(exact_share*n) and 1<=kept_count(n, k/1000)<=n
    assert floor_count(n, k/1000)==max(1, math.floor(exact_share*n))
    higher = min(k+more, 1000)/1000
    assert kept_count(n, higher)>=kept_count(n, k/1000) and floor_count(n, higher)>=floor_count(n, k/1000)

whole = st.one_of(st.integers(0, 10**6), st.integers(0, 127).map(np.int8), st.integers(0, 2**63-1).map(np.int64))

@tries(100)
@given(whole, st.one_of(st.integers(2, 60), st.integers(2, 60).map(np.int8)))
@example(np.int8(16), 14) # was -32 in the first block
def test_falling_r(r, depth):
    rs = falling_r(r, depth)
    assert len(rs)==depth and all(type(v) is int and checked_r(v)==v for v in rs)
    assert rs[0]==2*int(r) and rs[-1]==0 and rs==sorted(rs, reverse=True)
    assert abs(sum(rs)-int(r)*int(depth))<=depth/2

def unit(seed, *shape):
    torch.manual_seed(seed)
    return torch.randn(*shape)

@tries(80)
@given(st.integers(1, 3), st.integers(1, 14), st.integers(0, 3), st.floats(0, 1), seeds)
def test_matching_by_loops(batch, n, p, share, seed):
    most = min((n+p+1)//2-(p+1)//2, (n+p)//2-p//2) # the fewer of even and odd places behind the prefix
    a_places = [i for i in range(n) if (i+p)%2==0]
    r = round(share*min(most, len(a_places)))
    assume(r>0)
    keys = unit(seed, batch, n, 16)
    kept,gone,into = match_tokens(keys, r, p)
    for i in range(batch):
        f = nn.functional.normalize(keys[i].double(), dim=-1)
        odd = [j for j in range(n) if (j+p)%2]
        best = {a: max(odd, key=lambda b: float(f[a]@f[b])) for a in a_places}
        by = sorted(a_places, key=lambda a: -float(f[a]@f[best[a]]))
        left = sorted(by[r:])+odd
        assert kept[i].tolist()==left and gone[i].tolist()==by[:r]
        assert [left[j] for j in into[i].tolist()]==[best[a] for a in by[:r]]

@tries(80)
@given(st.integers(1, 3), st.integers(2, 14), st.floats(0, 1), st.sampled_from([0.,.5,1.,3.]), seeds)
def test_folding_by_loops(batch, n, share, lam, seed):
    k = 1+round(share*(n-2))
    keys,scores = unit(seed, batch, n, 8),unit(seed+1, batch, n).abs()
    kept,gone,into = fold_tokens(keys, scores, k, lam)
    for i in range(batch):
        f = nn.functional.normalize(keys[i].double(), dim=-1)
        alike,s = f @ f.T,scores[i].tolist()
        order = sorted(range(n), key=lambda j: -s[j])
        price = {}
        for o,j in enumerate(order):
            apart = 1-max((float(alike[j,b]) for b in order[:o]), default=-2)
            price[j] = lam*math.log(s[j])+math.log(apart)
        out = sorted(order, key=price.get)[:n-k]
        stay = [j for j in order if j not in out]
        assert kept[i].tolist()==stay and gone[i].tolist()==out
        assert [stay[j] for j in into[i].tolist()]==[max(stay, key=lambda b: float(alike[a,b])) for a in out]

@tries(60)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 2), seeds, st.sampled_from(['drop','fuse','merge']))
def test_reductions_by_loops(batch, n, p, seed, what):
    torch.manual_seed(seed)
    k = int(torch.randint(1, n, ())) # one goes, at least
    order = torch.stack([torch.randperm(n) for _ in range(batch)])
    kept,gone = order[:,:k],order[:,k:]
    x,size = torch.randn(batch, p+n, 3),torch.randint(1, 9, (batch,n)).float()
    into = torch.randint(0, k, gone.shape)
    r = dict(drop=Reduction(kept), fuse=Reduction(kept, gone, gone_weights=torch.rand(gone.shape)),
             merge=merging(kept, gone, into, size))[what]
    y,s = r.tokens(x, p),r.sizes(size)
    for i in range(batch):
        rows,total = [x[i,p+j] for j in kept[i]],[size[i,j] for j in kept[i]]
        if what=='fuse':
            rows.append(sum((w*x[i,p+g] for w,g in zip(r.gone_weights[i], gone[i])), torch.zeros(3)))
            total.append(size[i,gone[i]].sum())
        if what=='merge':
            for j in range(k):
                mine = [int(kept[i,j])]+gone[i][into[i]==j].tolist()
                total[j] = size[i,mine].sum()
                rows[j] = (size[i,mine,None]*x[i,p:][mine]).sum(0)/total[j]
        want = torch.stack([*x[i,:p], *rows])
        torch.testing.assert_close(y[i], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s[i], torch.stack(total), rtol=1e-6, atol=0)
    t = torch.randn(batch, 2, n, 2)
    torch.testing.assert_close(r.along(t, 2).shape, (batch,2,y.shape[1]-p,2))
    steady = torch.full((batch,1,n), 2.5) # what is the same everywhere stays the same
    torch.testing.assert_close(r.along(steady, 2), torch.full((batch,1,y.shape[1]-p), 2.5))

temperatures = st.one_of(st.floats(2e-38, 1e30), st.just(math.inf))

@tries(100)
@given(st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 4)), seeds, temperatures, st.booleans(),
       st.floats(0, 1), st.sampled_from([1e-9,1e-3,1.,1e6]), st.booleans())
def test_fusion_by_scipy(shape, seed, tau, raw, hidden, scale, endless):
    x = unit(seed, *shape)
    scores = torch.rand(shape[:2])*scale
    scores = scores.masked_fill(torch.rand(shape[:2])<hidden/2, -torch.inf)
    if endless: scores = scores.masked_fill(torch.rand(shape[:2])<.3, torch.inf)
    w = fusion_weights(scores, tau, raw)
    assert w.isfinite().all() and (w>=0).all()
    if raw: want = scores.where(scores.isfinite(), 0.).numpy()
    else:
        s = scores.double().clamp(max=torch.finfo(torch.float32).max).numpy()
        s = np.where(np.isinf(s).all(1, keepdims=True), 0, s)
        top = s.max(1, keepdims=True)
        with np.errstate(over='ignore'): less = np.where(np.isinf(s), s, (s-top)/tau)
        want = special.softmax(less, axis=1)
        torch.testing.assert_close(w.sum(1), torch.ones(shape[0]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(w, want, rtol=1e-3, atol=1e-5)
    fused = fuse_tokens(x, scores, tau, raw)
    assert fused.shape==(shape[0],1,shape[2])
    torch.testing.assert_close(fused, (w.unsqueeze(2)*x).sum(1, keepdim=True), rtol=1e-5, atol=1e-5*scale+1e-6)

@tries(40)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 8), seeds,
       st.sampled_from(['plain','gap','registers']), st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_positions_of_overlapping_patches(grid, stride, seed, kind, more):
    "Flat positions stay flat, a mirrored table gives the mirrored answer, prefix tokens keep theirs"
    size = tuple(8*g+m for g,m in zip(grid, more))
    torch.manual_seed(seed)
    model = KINDS[kind](img_size=size, embed_dim=16, depth=1, num_heads=2)
    p = 0 if model.no_embed_class else model.num_prefix_tokens
    def resampled(table):
        other = copy.deepcopy(model)
        with torch.no_grad(): other.pos_embed[:,p:] = table.reshape(1, -1, 16)
        overlap_patches(other, stride)
        assert torch.equal(other.pos_embed[:,:p], model.pos_embed[:,:p])
        new = tuple((s-8)//stride+1 for s in size)
        assert other.patch_embed.grid_size==new and other.patch_embed.num_patches==math.prod(new)
        return other, other.pos_embed.detach()[0,p:].reshape(*new, 16)
    table = torch.randn(*grid, 16)
    other,got = resampled(table)
    if stride==8: assert torch.equal(got, table)
    assert got.isfinite().all()
    torch.testing.assert_close(resampled(table.flip(0))[1], got.flip(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(resampled(table.flip(1))[1], got.flip(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(resampled(torch.full_like(table, .7))[1], torch.full_like(got, .7), rtol=0, atol=1e-5)
    with torch.no_grad(): y = other.eval().forward_features(torch.randn(1, 3, *size))
    assert y.shape[1]==other.num_prefix_tokens+got.shape[0]*got.shape[1]

# ---------------------------------------------------------------- whatever somebody gives

numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.fractions(), st.decimals(), st.complex_numbers(),
                    st.integers(-128, 127).map(np.int8), st.floats(width=32).map(np.float32),
                    st.sampled_from([10**400,-10**400,1e-320]))
arrays = st.one_of(st.lists(st.floats(width=32), max_size=4).map(torch.tensor), st.integers(-9, 9).map(torch.tensor),
                   st.lists(st.integers(-3, 5), max_size=4).map(np.array), st.integers(-9, 9).map(np.array))
anything = st.one_of(st.none(), numbers, arrays, st.text(max_size=5), st.binary(max_size=3),
                     st.sampled_from([dict, dict(a=1), object(), lambda a: a.mean(1), lambda a: a, torch.float32]),
                     st.lists(numbers, max_size=4), st.tuples(numbers), st.sets(st.integers(0, 4), max_size=3))

def answer_or_sentence(f, *args):
    "What it answers; None for an error that says something"
    try: return f(*args)
    except (ValueError,TypeError) as e:
        assert len(str(e).split())>=4, repr(e)
        return None

@tries(300)
@given(anything)
@example(0.) # was a fusion token of nan
@example(10**400) # was an OverflowError, and a schedule without end
@example(torch.tensor(3)) # was no block of these: 'iteration over a 0-d tensor'
def test_whatever_is_given_for_a_setting(value):
    rate = answer_or_sentence(checked_rate, value)
    assert rate is None or type(rate) is float and 0<rate<=1
    r = answer_or_sentence(checked_r, value)
    assert r is None or type(r) is int and r>=0
    tau = answer_or_sentence(get_temperature, value, INDICATORS['mean'])
    assert tau is None or type(tau) is float and np.float32(tau)>0
    each = answer_or_sentence(one_each, value, 3, 'rate')
    assert each is None or type(each) is list and len(each)==3
    f = answer_or_sentence(get_indicator, value, 4)
    assert f is None or f(torch.rand(2, 4, 5)).shape==(2,5)
    blocks = answer_or_sentence(block_ids, _made('plain', (2,2), 2, 4, torch.float32, 0), value)
    assert blocks is None or blocks and set(blocks)<=set(range(4)) and len(set(blocks))==len(blocks)
    rs = answer_or_sentence(falling_r, value, 4)
    assert rs is None or len(rs)==4 and rs[-1]==0
    assert rs is None or answer_or_sentence(falling_r, 3, value) is None or value>1
    fused = answer_or_sentence(fuse_tokens, torch.ones(2,3,4), torch.rand(2,3), value)
    assert fused is None or torch.allclose(fused, torch.ones(2,1,4))

@tries(100)
@given(anything, st.sampled_from(['plain','gap','registers']))
def test_whatever_is_given_for_a_stride(value, kind):
    model = copy.deepcopy(_made(kind, (2,3), 2, 2, torch.float32, 0))
    before = model.pos_embed
    if answer_or_sentence(overlap_patches, model, value) is None: # and nothing was changed
        assert model.pos_embed is before and model.patch_embed.proj.stride==(8,8)
    else: assert 1<=value<=8

@tries(150)
@given(st.tuples(*[st.integers(0, 4)]*3), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(-2, 4),
       st.one_of(st.none(), st.lists(st.integers(-1, 4), max_size=3), anything), seeds, st.booleans())
@example((0,1,2), [0,4], 0, None, 0, True) # no image: was a RuntimeError, as were the other two
@example((1,3,2), [1,4], 2, [2,3], 0, True)
@example((1,3,2), [2,4], 2, None, 0, True)
def test_whatever_is_given_to_scatter_back(shape, owners_shape, most, grid, seed, whole_numbers):
    torch.manual_seed(seed)
    x,owners = torch.randn(shape),torch.randint(-1, max(most+1, 0), owners_shape)
    owners = owners if whole_numbers else owners.float()
    y = answer_or_sentence(scatter_back, x, owners, grid)
    if y is None: return
    assert y.shape[:1]==shape[:1]
    y = y if grid is None else y.flatten(2).transpose(1, 2)
    for i in range(shape[0]):
        for j,o in enumerate(owners.expand(shape[0], -1)[i].tolist()):
            assert torch.equal(y[i,j], x[i,o] if o>=0 else torch.zeros(shape[2]))
