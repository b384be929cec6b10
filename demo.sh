#!/bin/sh
# The whole way, offline: a trained model on real digits, then an ImageNet-sized one with made-up weights.
set -eu
rx="$BIN/rxdeploy"
say() { printf '\n# %s\n' "$*"; }

rm -rf demo
mkdir demo
cd demo

say "1. What is on this machine, and what each missing piece would add."
"$rx" doctor

cat <<'EOF'

# How to read a build. Stages, with the time each took ("reused" when the cache had it):
#   export         the model as a float32 ONNX graph, batch-norms folded in
#   validate fp32  that graph on ONNX Runtime against PyTorch, on photographs and noise: how far the outputs differ,
#                  and whether any image changes its class (tied: PyTorch itself hardly prefers one of two classes)
#   precision      the graph in float16 (how many weights were rounded, and how many of them to zero) or int8
#   validate fp16  that graph against PyTorch
#   calibrate      (int8) which ranges the eight bits span, found on images; the error it leaves on others, as SQNR
#   engine         the TensorRT plan
#   bundle         the folder with model, plan, labels and manifest, moved into place whole
# Then what the bundle is: whose weights are in it, what it runs on, what goes in and comes out, how far the deployed
# model is from PyTorch, what was counted in it, and its files.
EOF

say "2. A small ResNeXt trained on handwritten digits: export to ONNX, check against PyTorch, make it float16," \
    "check again, build a TensorRT engine, and put everything into one folder, the bundle."
"$rx" build digits_resnext14_8x8d --fp16

say "3. Ten digits it has never seen, written as image files, and what the bundle takes them for" \
    "(the file name says what each is)."
"$BIN/python" -m rxdeploy.cards.digits_images digits --count 10
"$rx" classify digits_resnext14_8x8d-fp16 digits/*.png --top 1

say "4. The digits model in int8: ranges from 256 training images, and its accuracy on 5400 hard variants of the held-out" \
    "digits, image by image against the float16 model. A drop of more than 0.5 points would end with exit code 1."
"$BIN/python" -m rxdeploy.cards.digits_images training --set train --folders --count 256
"$BIN/python" -m rxdeploy.cards.digits_images hard.npz --set hard
"$rx" build digits_resnext14_8x8d --int8 --calibration-data training --target onnxruntime
"$rx" evaluate digits_resnext14_8x8d-int8 --data hard.npz --baseline digits_resnext14_8x8d-fp16 --max-drop 0.5 --device cpu

say "5. An ImageNet model in float16. Its trained weights need a download, so these are synthetic:" \
    "everything below is real except what the model knows."
"$rx" build gluon_resnext50_32x4d --fp16 --weights synthetic

say "6. A real photograph (a cat) through that bundle: the names are ImageNet's, the guesses mean nothing."
cp ../rxdeploy/export/photos/cat.jpg .
"$rx" classify gluon_resnext50_32x4d-fp16 cat.jpg

say "7. What is in the bundle; every file was just checked against its digest."
"$rx" inspect gluon_resnext50_32x4d-fp16

say "8. How fast it is here: the runtime's throughput and latency, against the card's FLOPs, against what was counted" \
    "in the graph, and against what this machine can do."
"$rx" bench gluon_resnext50_32x4d-fp16 --batch 1,8 --seconds 1

say "The bundles are in demo/. Next: rxdeploy build gluon_resnext101_64x4d --fp16 (downloads 335 MB of weights)."
