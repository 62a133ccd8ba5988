"A pruned model outside of PyTorch's eager mode."
import timm, torch, pytest
from attn_diversity.methods import apply_method
from attn_diversity.overlap import overlap_patches
from attn_diversity.pruning import prune_vit

@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('deit_tiny_patch16_224', img_size=112, num_classes=10).eval()

@pytest.mark.parametrize('indicator', ['mean','variance','medad'])
def test_onnx_gives_the_same_logits(model, indicator, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    prune_vit(model, keep_rate=.7, indicator=indicator, fuse='raw' if indicator=='mean' else True)
    x = torch.randn(2,3,112,112)
    torch.onnx.export(model, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(out), model(x).detach(), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('method', ['tome','dynamicvit'])
def test_other_methods_and_overlapping_patches_in_onnx(model, method, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    apply_method(overlap_patches(model, 12), method, .7, r=5)
    x = torch.randn(2,3,112,112)
    torch.onnx.export(model, (x,), tmp_path/'m.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(out), model(x).detach(), atol=1e-4, rtol=1e-4)

def test_exported_program_survives_the_disk(model, tmp_path):
    prune_vit(model, keep_rate=.7)
    x = torch.randn(2,3,112,112)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=32)},)), tmp_path/'m.pt2')
    back = torch.export.load(tmp_path/'m.pt2').module()
    for n in (1,2,5):
        x = torch.randn(n,3,112,112)
        torch.testing.assert_close(back(x), model(x), atol=1e-5, rtol=1e-5)

def test_threads_do_not_mix(model):
    "Two threads on one pruned model give what each would give alone"
    from concurrent.futures import ThreadPoolExecutor
    prune_vit(model, keep_rate=.5, indicator='medad')
    xs = torch.randn(8,1,3,112,112)
    with torch.inference_mode():
        alone = [model(x) for x in xs]
        with ThreadPoolExecutor(4) as pool: together = list(pool.map(lambda x: torch.inference_mode()(model)(x), xs))
    for a,b in zip(alone, together): torch.testing.assert_close(a, b)
