"A reduced model outside of PyTorch's eager mode."
import pytest, timm, torch
from torch import nn
from attn_diversity.methods import reduce_vit
from attn_diversity.overlap import overlap_patches
from attn_diversity.pruning import prune_vit

archs = ('deit_tiny_patch16_224','vit_small_patch16_dinov3','vit_base_patch16_siglip_224',
         'vit_small_patch14_reg4_dinov2')
methods = dict(variance=dict(keep_rate=.7), evit=dict(keep_rate=.7), tome=dict(r=3), fold=dict(r=3),
               dynamicvit=dict(keep_rate=.7))

class Dense(nn.Module):
    "Features on the grid after three blocks"
    def __init__(self, vit):
        super().__init__()
        self.vit = vit
    def forward(self, x):
        return torch.stack(self.vit.forward_intermediates(x, indices=[0,1,2], intermediates_only=True))

def made(arch, method, **kw):
    torch.manual_seed(0)
    side = 112 if '16' in arch else 70
    vit = timm.create_model(arch, img_size=side, depth=3, embed_dim=48, num_heads=4, num_classes=10, **kw).eval()
    with torch.no_grad():
        for p in vit.parameters(): p.add_(torch.randn_like(p)*.05)
    return reduce_vit(vit, method, **methods[method]).eval().requires_grad_(False), torch.randn(2,3,side,side)

@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('deit_tiny_patch16_224', img_size=112, depth=4, num_classes=10).eval()

# each architecture and each method twice or more, with dense features and without; the rest takes three times as long
@pytest.mark.parametrize('arch,method,dense', [
    pytest.param(a, m, d, marks=[] if (i+j+2*d)%4==0 else pytest.mark.slow)
    for i,a in enumerate(archs) for j,m in enumerate(methods) for d in (False,True)])
def test_compiled_whole_and_exported(arch, method, dense):
    "`fullgraph=True` fails rather than falls back; the exported program takes any batch size"
    model,x = made(arch, method)
    model = Dense(model) if dense else model
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=32)},)).module()
    for n in (1,3):
        x = torch.randn(n, *x.shape[1:])
        torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-5)

def onnx_outputs(model, x, path):
    "What ONNX Runtime makes of it, with another batch size than the one it was exported with"
    onnxruntime = pytest.importorskip('onnxruntime')
    batch = torch.export.Dim('batch', min=1, max=32)
    torch.onnx.export(model, (x[:2],), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(path)
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

@pytest.mark.parametrize('arch,method,dense', [
    ('deit_tiny_patch16_224','variance',False), ('vit_small_patch16_dinov3','variance',True),
    ('vit_base_patch16_siglip_224','fold',True), # tome: below
    ('vit_small_patch14_reg4_dinov2','dynamicvit',True),
    *[pytest.param(a, m, d, marks=pytest.mark.slow) for a in archs for m in methods for d in (False,True)]])
def test_onnx_with_any_batch_size(arch, method, dense, tmp_path):
    model,x = made(arch, method)
    model,x = Dense(model) if dense else model,torch.cat([x,x[:1]])
    torch.testing.assert_close(onnx_outputs(model, x, tmp_path/'m.onnx'), model(x), atol=1e-4, rtol=1e-4)

def test_overlapping_patches_in_onnx(model, tmp_path):
    reduce_vit(overlap_patches(model, 12), 'tome', r=5)
    x = torch.randn(3,3,112,112)
    torch.testing.assert_close(onnx_outputs(model, x, tmp_path/'m.onnx'), model(x).detach(), atol=1e-4, rtol=1e-4)

def test_exported_program_survives_the_disk(model, tmp_path):
    prune_vit(model, keep_rate=.7)
    x = torch.randn(2,3,112,112)
    batch = torch.export.Dim('batch', min=1, max=32)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path/'m.pt2')
    back = torch.export.load(tmp_path/'m.pt2').module()
    for n in (1,2,5):
        x = torch.randn(n,3,112,112)
        torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=1e-5)
