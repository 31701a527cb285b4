// Tokens of texts, and tokens generated greedily after some tokens, by llama.cpp: node llama_cpp.mjs FILE.gguf REQUEST.json ANSWER.json
import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [file, request, answer] = process.argv.slice(2);
const require = createRequire(process.env.NODE_LLAMA_CPP + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const {texts, prompt, count} = JSON.parse(fs.readFileSync(request, "utf-8"));
const llama = await getLlama({gpu: false, build: "never"});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const tokens = texts.map((text) => Array.from(model.tokenize(text, false)));
const sequence = (await model.createContext({contextSize: 256})).getSequence();
const made = [];
for await (const token of sequence.evaluate(prompt, {temperature: 0})) {
    made.push(token);
    if (made.length >= count) break;
}
fs.writeFileSync(answer, JSON.stringify({tokens, made, begin: model.tokens.shouldPrependBosToken ? model.tokens.bos : null}));
process.exit(0);
