// Log-probabilities of the tokens of texts, by llama.cpp: node llama_cpp_odds.mjs FILE.gguf TOKENS.json ANSWER.json
import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [file, request, answer] = process.argv.slice(2);
const require = createRequire(process.env.NODE_LLAMA_CPP + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const texts = JSON.parse(fs.readFileSync(request, "utf-8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const sequence = (await model.createContext({contextSize: 256})).getSequence();
const options = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
const odds = [];
for (const tokens of texts) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(tokens.map((token) => [token, {generateNext: options}]));
    odds.push(...found.slice(0, -1).map((one, i) => Math.log(one.next.probabilities.get(tokens[i + 1]))));
}
fs.writeFileSync(answer, JSON.stringify(odds));
process.exit(0);
