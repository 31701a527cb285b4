// Records the microphone as a WAV file, which every model of recordings reads.
export async function startRecording() {
  if (!navigator.mediaDevices) throw new Error("Browsers record only on https or localhost. Choose a file instead.");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  const context = new AudioContext();
  await context.audioWorklet.addModule("/page/recorder.js");
  const node = new AudioWorkletNode(context, "recorder"), blocks = [];
  node.port.onmessage = (event) => blocks.push(event.data);
  context.createMediaStreamSource(stream).connect(node);
  return async () => {
    stream.getTracks().forEach((track) => track.stop());
    const rate = context.sampleRate;
    await context.close();
    return new File([encodeWav(blocks, rate)], "recording.wav", { type: "audio/wav" });
  };
}

function encodeWav(blocks, rate) {
  const count = blocks.reduce((total, block) => total + block.length, 0), view = new DataView(new ArrayBuffer(44 + 2 * count));
  const write = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF"); view.setUint32(4, 36 + 2 * count, true); write(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  write(36, "data"); view.setUint32(40, 2 * count, true);
  let at = 44;
  for (const block of blocks) for (const sample of block) { view.setInt16(at, 32767 * Math.max(-1, Math.min(1, sample)), true); at += 2; }
  return view.buffer;
}
