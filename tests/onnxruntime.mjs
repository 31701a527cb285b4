// Outputs of an ONNX file for one batch, by onnxruntime-node or onnxruntime-web: node onnxruntime.mjs PACKAGE MODEL.onnx BATCH.json OUTPUTS.json
import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [name, file, batch, answer] = process.argv.slice(2);
const require = createRequire(process.env.NODE_ONNXRUNTIME + "/");
const imported = await import(pathToFileURL(require.resolve(name)));
const ort = imported.default ?? imported;
const arrays = {float32: Float32Array, float64: Float64Array, int64: BigInt64Array, uint8: Uint8Array, bool: Uint8Array};
const convert = (type, data) =>
    type === "string" ? data : arrays[type].from(data, type === "int64" ? BigInt : Number);
const feeds = {};
for (const [key, {type, dims, data}] of Object.entries(JSON.parse(fs.readFileSync(batch, "utf-8"))))
    feeds[key] = new ort.Tensor(type, convert(type, data), dims);
const session = await ort.InferenceSession.create(name === "onnxruntime-web" ? fs.readFileSync(file) : file);
const outputs = {};
for (const [key, {type, dims, data}] of Object.entries(await session.run(feeds)))
    outputs[key] = {type, dims, data: Array.from(data, type === "string" ? String : Number)};
fs.writeFileSync(answer, JSON.stringify(outputs));
process.exit(0);
