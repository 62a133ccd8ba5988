"One way in for a picture and one rule for what a model sees of it: to the value, wherever it is looked at"
import io
from types import SimpleNamespace
import numpy as np, pytest, timm, torch
from fastai.data.all import Normalize
from fastai.vision.all import ImageDataLoaders, PILImageBW, RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from PIL import Image, TiffImagePlugin
from skimage.data import coffee
from torch import nn
from attn_diversity.data import (CropFlip, digits_dls, eye_of, folder_dls, imagenet100_dls, open_picture, photograph,
                                 rule_of, seen_by)
from attn_diversity.learner import prune_learner
from attn_diversity.measure import count_flops
from attn_diversity.methods import quality
from attn_diversity.prepare import prepare
from attn_diversity.pruning import prune_vit
from attn_diversity.session import Session, open_photo
from attn_diversity.vis import show_stages

SIDE = 32

def vit(**kw): return timm.create_model('vit_tiny_patch16_224', img_size=SIDE, depth=2, num_classes=2, **kw).eval()

def marked(n): # EXIF that says how a camera was held
    exif = Image.Exif()
    exif[0x0112] = n
    return exif

def kinds(folder): # {name: what it shows, [64, 96, 3]}; the files are written without loss
    photo = np.asarray(Image.fromarray(coffee()).resize((96,64)))
    im = Image.fromarray(photo)
    grey,disc = np.asarray(im.convert('L')),np.hypot(*np.ogrid[-32:32,-48:48])<30
    shown = dict.fromkeys(('plain.png','cmyk.tif'), photo)
    im.save(folder/'plain.png')
    im.convert('CMYK').save(folder/'cmyk.tif')
    held = {2: photo[:,::-1], 3: photo[::-1,::-1], 4: photo[::-1], 5: photo.swapaxes(0,1), 6: np.rot90(photo),
            7: np.rot90(photo.swapaxes(0,1), 2), 8: np.rot90(photo, -1)}
    for n,a in held.items():
        Image.fromarray(np.ascontiguousarray(a)).save(folder/f'turned{n}.png', exif=marked(n))
        shown[f'turned{n}.png'] = photo
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6
    Image.fromarray(np.rot90(photo).copy()).save(folder/'turned.tif', tiffinfo=tags)
    shown['turned.tif'] = photo
    alpha = (disc*255).astype(np.uint8)
    Image.fromarray(np.dstack([photo, alpha])).save(folder/'clear.png')
    shown['clear.png'] = np.where(disc[...,None], photo, 255)
    Image.merge('LA', [Image.fromarray(a) for a in (grey, alpha)]).save(folder/'clear grey.png')
    shown['clear grey.png'] = np.where(disc, grey, 255)[...,None].repeat(3, 2)
    Image.fromarray(grey.astype(np.uint16)*257).save(folder/'deep.png')
    shown['deep.png'] = grey[...,None].repeat(3, 2)
    few = im.quantize(16)
    few.save(folder/'palette.png')
    shown['palette.png'] = np.asarray(few.convert('RGB'))
    few.save(folder/'clear palette.png', transparency=3)
    shown['clear palette.png'] = np.where((np.asarray(few)==3)[...,None], 255, shown['palette.png'])
    return shown

def seen_by_hand(a, mean, std): # the middle square to a seventh more, the middle of that, normalised
    square = Image.fromarray(np.ascontiguousarray(a, np.uint8)).crop((16,0,80,64))
    x = np.asarray(square.resize((37,37), Image.Resampling.BILINEAR))[2:34,2:34]/255
    return torch.tensor((x-mean)/std).permute(2,0,1).float()

@pytest.fixture(scope='module')
def photos(tmp_path_factory): # (tree, {name: what it shows})
    root = tmp_path_factory.mktemp('photos')
    for part in ('train','val'):
        for c in 'ab': (root/part/c).mkdir(parents=True)
    shown = kinds(root/'val'/'a')
    for c in 'ab': kinds(root/'train'/c)
    (root/'val'/'b'/'plain.png').write_bytes((root/'val'/'a'/'plain.png').read_bytes())
    return root, shown

def test_the_same_picture_wherever_it_is_looked_at(photos, tmp_path):
    root,shown = photos
    prepare(root, tmp_path/'copy', short_side=64, n_workers=0)
    assert len(list((tmp_path/'copy').rglob('*.*g')))==3*len(shown)+1
    for name,want in shown.items():
        f = root/'val'/'a'/name
        copy = tmp_path/'copy'/'val'/'a'/(name if name.endswith('.png') else name+'.png')
        for got in (photograph(f), photograph(str(f)), photograph(f.read_bytes()), photograph(Image.open(f)),
                    photograph(photograph(f)), open_photo(f), Image.open(copy).convert('RGB')):
            assert got.mode=='RGB' and np.array_equal(np.asarray(got), want), name
    dls = folder_dls(root, img_size=SIDE, batch_size=4, n_workers=0)
    assert not dls.left_out
    learn = prune_learner(dls, vit(), pretrained=False)
    model = learn.model.eval()
    model.recipe = dict(learn.recipe, resize=rule_of(dls))
    assert model.recipe['resize']==37 and model.recipe['mean']==[.5]*3
    files = dls.valid_ds.items
    x = torch.cat([b[0] for b in dls.valid]).as_subclass(torch.Tensor).cpu()
    assert torch.equal(seen_by(model, files), x)
    for f,each in zip(files, x):
        hand = seen_by_hand(shown[f.name], .5, .5)
        assert torch.allclose(each, hand, atol=1e-5), f
    s = Session(model, blocks=[1])
    for f,each in zip(files, x): assert torch.equal(s.load(f).x[0], each), f
    fig = show_stages(model, files[:2])
    for ax,each in zip(fig.axes[::len(fig.axes)//2], x):
        assert np.allclose(ax.images[0].get_array(), (each*.5+.5).permute(1,2,0), atol=1e-6)

def test_a_damaged_note_of_the_camera_turns_nothing(tmp_path):
    im = Image.fromarray(coffee()).resize((96,64))
    damaged = (b'', b'MM\0*\xff\xff\xff\xff', b'II*\0\x08\0\0\0\x05\0\x12\x01', b'no TIFF')
    for i,note in enumerate(b'Exif\0\0'+d for d in damaged):
        file = io.BytesIO()
        im.save(file, 'JPEG', exif=note)
        assert photograph(file.getvalue()).size==(96,64), note
        (tmp_path/'in').mkdir(exist_ok=True)
        (tmp_path/'in'/f'{i}.jpg').write_bytes(file.getvalue())
    for kind in ('PNG','WEBP'): # of which Pillow raises an error
        im.save(tmp_path/'in'/f'{kind}.{kind.lower()}', kind, exif=b'no TIFF')
        assert photograph(tmp_path/'in'/f'{kind}.{kind.lower()}').size==(96,64), kind
    for n in (0, 9): assert photograph(_jpeg(im, exif=marked(n))).size==(96,64)
    assert not prepare(tmp_path/'in', tmp_path/'out', n_workers=0)['left_out']

def _jpeg(im, **kw):
    file = io.BytesIO()
    im.save(file, 'JPEG', **kw)
    return file.getvalue()

def test_a_photograph_that_is_given_stays_open_and_as_it_is(tmp_path):
    (tmp_path/'a.jpg').write_bytes(_jpeg(Image.fromarray(coffee()), exif=marked(6)))
    im = Image.open(tmp_path/'a.jpg')
    first = photograph(im)
    assert first.size==im.size[::-1] and type(im).__name__=='JpegImageFile'
    assert np.array_equal(first, photograph(im)) # decoded from the same file once more
    plain = Image.fromarray(coffee())
    made = photograph(plain)
    made.paste(0, (0,0,100,100))
    assert type(plain) is Image.Image and np.array_equal(plain, coffee())
    assert np.array_equal(photograph(coffee()), coffee())

def test_what_training_could_not_read_is_left_out_before_it(photos, tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(3): Image.fromarray(coffee()).resize((48,32)).save(tmp_path/c/f'{i}.png')
    Image.fromarray(np.full((32,32), 1e6, np.float32)).save(tmp_path/'a'/'bright.tif')
    with pytest.warns(UserWarning, match='bright.tif .pixels from 1e.06 to 1e.06 in mode F'):
        assert len(folder_dls(tmp_path, SIDE, 2, n_workers=0).left_out)==1

@pytest.mark.parametrize('source,kind,said', [
    ('nowhere.jpg', FileNotFoundError, 'nowhere.jpg is not there. Give the path'),
    ('.', ValueError, r'\. cannot be read as an image .*is a folder'), ('', ValueError, 'cannot be read'),
    (b'text', ValueError, 'The picture cannot be read as an image .in no known format'),
    (5, TypeError, '5 is no picture: give a path'), (None, TypeError, 'None is no picture'),
    (io.BytesIO(b'text'), TypeError, 'is no picture'),
    (np.zeros((4,4,3)), ValueError, 'The picture cannot be read as an image .TypeError')])
def test_what_is_no_picture_is_said(source, kind, said):
    with pytest.raises(kind, match=said): photograph(source)
    with pytest.raises(kind, match=said): seen_by(vit(), source if isinstance(source, str) else [source])

def test_the_rule_of_data(photos):
    root,_ = photos
    def rule(**kw): return rule_of(ImageDataLoaders.from_folder(root, valid='val', bs=4, num_workers=0, **kw))
    assert rule(item_tfms=Resize(40))==rule(item_tfms=Resize(40), batch_tfms=aug_transforms())==40
    assert rule(item_tfms=Resize(40), batch_tfms=[CropFlip(SIDE), Normalize.from_stats([.5]*3, [.5]*3)])==40
    others = [Resize(40, ResizeMethod.Squish), Resize(40, ResizeMethod.Pad), Resize((40,50)), RandomResizedCrop(40)]
    assert [rule(item_tfms=t) for t in others]==[None]*4
    assert rule(item_tfms=Resize(40), batch_tfms=aug_transforms(size=SIDE)) is None
    assert rule_of(digits_dls(SIDE))==SIDE # nothing is cut off
    other = [(torch.zeros(3,SIDE,SIDE), 0)]
    loader = torch.utils.data.DataLoader(other)
    dls = type('Other', (), dict(valid=loader))
    assert rule_of(dls) is None

def test_the_eye_of_a_model():
    photo = coffee()
    own = timm.create_model('deit_tiny_patch16_224', depth=1)
    cfg = timm.data.resolve_data_config(model=own)
    want = timm.data.create_transform(**cfg)(Image.fromarray(photo))
    assert torch.allclose(seen_by(own, photo)[0], want, atol=1e-5) # as timm measured it
    wide = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=(32,64))
    assert seen_by(wide, [photo, photo]).shape==(2,3,32,64)
    m = vit()
    timms = seen_by(m, photo)
    m.recipe = dict(img_size=SIDE, mean=[.5]*3, std=[.25]*3)
    assert eye_of(m)['resize']==37 and eye_of(m)['std']==[.25]*3 and not torch.equal(seen_by(m, photo), timms)
    assert torch.equal(seen_by(nn.DataParallel(m), photo), seen_by(m, photo))
    assert seen_by(m.half(), photo).dtype==torch.float16
    m.recipe['img_size'] = 48
    with pytest.raises(ValueError, match='images of 48 x 48 pixels, as its recipe says, and takes 32 x 32'): eye_of(m)
    m.set_input_size((48,48))
    assert seen_by(m, photo).shape[-1]==48
    with pytest.raises(ValueError, match='images of 5 channels; pictures have 3, or 1'): eye_of(vit(in_chans=5))
    with pytest.raises(TypeError, match='pictures is a tensor'): seen_by(m, torch.zeros(1,3,48,48))
    with pytest.raises(ValueError, match='pictures is empty'): seen_by(m, [])

def test_the_eye_of_other_libraries():
    m = nn.Sequential(nn.Conv2d(3, 8, 16, 16)) # what these libraries leave at their models
    m.config = SimpleNamespace(image_size=64) # transformers
    assert (eye_of(m)['img_size'], eye_of(m)['resize'], eye_of(m)['mean'][0])==((64,64), 73, .485)
    m.recipe = dict(mean=[.5]*3)
    assert eye_of(m)['mean']==[.5]*3 and eye_of(m)['resize']==73
    visual = nn.Sequential(nn.Conv2d(3, 8, 8, 8)) # open_clip
    visual.image_size = (48,48)
    visual.preprocess_cfg = dict(mean=(.48,.46,.41), std=(.27,.26,.28), interpolation='bicubic')
    clip = nn.Module()
    clip.visual = visual
    want = Image.fromarray(coffee()).resize((72,48), Image.Resampling.BICUBIC).crop((12,0,60,48))
    for model in (clip, visual):
        back = seen_by(model, coffee())[0].permute(1,2,0)*torch.tensor([.27,.26,.28])+torch.tensor([.48,.46,.41])
        assert np.allclose(back*255, np.asarray(want), atol=1e-3)

def test_grey_pictures(photos, tmp_path):
    root,shown = photos
    m = vit(in_chans=1)
    assert count_flops(m)<count_flops(vit()) # of its own channels
    dls = ImageDataLoaders.from_folder(root, valid='val', img_cls=PILImageBW, item_tfms=Resize(37), bs=4, num_workers=0,
                                       batch_tfms=[CropFlip(SIDE), Normalize.from_stats([.4], [.3], cuda=False)])
    m.recipe = dict(img_size=SIDE, mean=[.4], std=[.3], resize=rule_of(dls))
    names = ('plain.png','palette.png') # what fastai opens as we do
    f = [f for f in dls.valid_ds.items if f.name in names]
    x, = dls.test_dl(f, bs=len(f)).one_batch()
    seen = seen_by(m, f)
    assert seen.shape==(3,1,SIDE,SIDE) and torch.equal(seen, x.cpu().as_subclass(torch.Tensor))
    del m.recipe
    assert eye_of(m)['mean']==[.5] # of three
    s = Session(m, blocks=[1]).load(f[0])
    assert s.image.shape==(SIDE,SIDE,3) and (s.image[...,0]==s.image[...,2]).all()
    show_stages(prune_vit(m, .5, blocks=[1]), f[0])

def test_images_that_nobody_normalised_are_not_scored(photos):
    root,_ = photos
    dls,m = folder_dls(root, img_size=SIDE, batch_size=4, n_workers=0),vit()
    with pytest.raises(ValueError, match=r'lie in 0...1, so nobody .* mean \[0.5, 0.5, 0.5\] and deviation'):
        quality(dict(m=m), dls.valid)
    dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3, cuda=False)], 'after_batch')
    with torch.no_grad(): right = torch.cat([m(x.as_subclass(torch.Tensor)).argmax(1)==y for x,y in dls.valid])
    assert quality(dict(m=m), dls.valid).accuracy[0]==pytest.approx(right.float().mean().item())
    m.recipe = dict(mean=[0.]*3, std=[1.]*3) # it says that it takes them
    assert len(quality(dict(m=m), [torch.rand(2,3,SIDE,SIDE)]))==1

@pytest.mark.parametrize('make', [folder_dls, imagenet100_dls])
def test_a_path_that_is_none(make):
    for path in (None, 5, ['photos']):
        with pytest.raises(TypeError, match='it must be the path of a folder'): make(path)

def test_a_picture_of_any_mode():
    im = Image.fromarray(coffee()).resize((48,32))
    grey = np.asarray(im.convert('L')).astype(int)
    for mode in ('1','L','P','RGB','RGBA','RGBa','LA','La','PA','CMYK','YCbCr','LAB','HSV','I','F','I;16','I;16B'):
        if mode.startswith('I;16'): odd = Image.fromarray(grey.astype(np.uint16)*257).convert('I').convert(mode)
        elif mode in ('La','PA'): odd = im.convert(dict(La='LA', PA='P')[mode]).convert(mode)
        else: odd = im.convert(mode)
        got = photograph(odd)
        assert (got.mode, got.size, odd.mode)==('RGB', (48,32), mode)
        assert mode=='1' or np.abs(np.asarray(got.convert('L')).astype(int)-grey).mean()<15, mode
    with open_picture(_jpeg(im)) as opened: assert photograph(opened).size==(48,32)
